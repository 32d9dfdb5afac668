"""The demo driver: an outsider that speaks Kafka and HTTP, and reads every figure back."""

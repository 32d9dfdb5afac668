"""librdkafka's in-memory broker, as a process: `mock_broker.py <file>`.

Writes the broker's address to the file and lives until it is killed. Four partitions always, no
durability, no rebalance of two members, no retention worth the name: for the demo and for wire
tests on a machine without a JVM, never for a claim about those (see `brokers.py`).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from confluent_kafka import Producer


def main() -> None:
    """Start the broker, write down where it is, and wait for the end."""
    # The broker lives inside this producer, and ends with it.
    keeper = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused"})
    brokers = keeper.list_topics(timeout=300).brokers.values()
    address = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
    address_file = Path(sys.argv[1])
    unfinished = address_file.with_suffix(".unfinished")
    unfinished.write_text(address)
    unfinished.replace(address_file)  # Who waits for the file never sees half an address.
    signal.pause()


if __name__ == "__main__":
    main()

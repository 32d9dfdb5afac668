"""What metering decides: values in, values out, no I/O and no clock.

Read `engine` first: it is the one way in. Beneath it `batch` has the types, `coverage` decides
which time is sold to whom, `sources` how far each agent's events have arrived, `quarantine` in
which states a rejected record can be. On their own stand `pricing` (which price lists may be added,
what a quote costs), `watermarks` (up to when a hub is complete) and `allocations` (when one is
final).
"""

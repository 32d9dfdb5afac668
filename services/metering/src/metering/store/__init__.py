"""The SQL of metering, and the rows it becomes types from.

`state` is all that metering a batch loads and saves, and the columns that others share with it.
`quarantine`, `hubs`, `prices` and `allocations` belong to a resource each, `queries` answers what
is asked of the accounts. Everything is read and written by sets: no statement runs per record.
"""

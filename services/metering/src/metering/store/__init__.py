"""The SQL of metering, and the rows it becomes types from.

`state` is all that metering a batch loads and saves, and the columns that others share with it.
`quarantine`, `hubs`, `prices` and `allocations` hold the tables they are named after, `queries`
answers what is asked of the accounts. A batch is read and written by sets: none of its statements
runs per record.
"""

-- What is asked of one allocation is found by an index however much is stored beside it.
--
-- An index is built under a lock that keeps writers of its table out, until the transaction, a file,
-- ends: so no file indexes two tables (0011 and 0013 have the others).

create index coverage_of_allocation on coverage (allocation_id, hub);

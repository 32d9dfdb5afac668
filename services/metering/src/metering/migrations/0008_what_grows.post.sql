-- Ended allocations are looked for hub by hub now.

drop index allocations_not_final;

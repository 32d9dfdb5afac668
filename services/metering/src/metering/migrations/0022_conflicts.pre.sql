-- Open conflicts of a hub are judged again where a correction has released time.

create index quarantine_conflicts on quarantine (hub, quarantine_id)
  where state = 'open' and reason = 'conflict';

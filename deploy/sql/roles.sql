-- The database roles of the three services, for one PostgreSQL server (15 or later).
--
-- Run by a superuser after the databases `metering`, `ledger` and `invoicing` exist; running it
-- again changes nothing. Passwords are set apart (`alter role ... password`), never in a file.
--
--   <service>_owner   owns the database and its schema; migrates; never serves
--   <service>_api     answers HTTP; sees one tenant at a time (row-level security)
--   <service>_writer  consumers and relays; its own row-level policy
--   <service>_reader  select only, for people who operate the service
--
-- Only the owner owns anything, and none of them is a superuser or passes by row-level security:
-- the migrations grant the other three, table by table, what they need.
do $roles$
declare
    service text;
    part text;
begin
    foreach service in array array['metering', 'ledger', 'invoicing'] loop
        foreach part in array array['owner', 'api', 'writer', 'reader'] loop
            if not exists (select from pg_roles where rolname = service || '_' || part) then
                execute format('create role %I', service || '_' || part);
            end if;
            execute format(
                'alter role %I with login nosuperuser nocreatedb nocreaterole noreplication'
                ' nobypassrls %s',
                service || '_' || part,
                -- Before PostgreSQL 16 an owner that does not inherit may not create anything in
                -- its own database: the schema belongs to pg_database_owner. It has no other group.
                case part when 'owner' then 'inherit' else 'noinherit' end
            );
        end loop;
        continue when not exists (select from pg_database where datname = service);
        execute format('alter database %I owner to %I', service, service || '_owner');
        execute format('revoke all on database %I from public', service);
        foreach part in array array['api', 'writer', 'reader'] loop
            execute format('grant connect on database %I to %I', service, service || '_' || part);
        end loop;
    end loop;
end
$roles$;

#!/bin/sh
# Run once by the PostgreSQL image on an empty volume: the three databases, their roles, the passwords.
set -eu
for service in metering ledger invoicing; do
  psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --command "create database $service"
done
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --file /hisab/roles.sql
for service in metering ledger invoicing; do
  for part in owner api writer; do
    variable="$(printf '%s_%s_PASSWORD' "$service" "$part" | tr '[:lower:]' '[:upper:]')"
    password="$(printenv "$variable")"
    printf "alter role %s_%s password :'password';\n" "$service" "$part" \
      | psql --set ON_ERROR_STOP=1 --set password="$password" --username "$POSTGRES_USER" \
          --dbname postgres
  done
done

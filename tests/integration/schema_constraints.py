"""Why no client can break a constraint of our schemas, for each that no request is shown for.

A client that breaks a constraint gets a 500 for what it did. So every constraint is either asked
for over HTTP, and refused with a problem of its own (the tables `SHOWN` beside each service's
tests), or stands here with the reason why no client can reach it. One that stands in neither place
fails `test_schema_constraints`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

Reasons = Mapping[str, str]
"""Constraints, separated by spaces, by the reason why no client can reach them."""

KIT: Final[Reasons] = MappingProxyType(
    {
        "our own hash of a secret of our own: 32 random bytes do not come twice": (
            "access_keys_sha256_check access_keys_sha256_key"
        ),
        "keys are stored by upsert; the id is made from the command": "access_keys_pkey",
        "the broker's numbers, advanced by the consumer alone": (
            "consumer_progress_attempts_check consumer_progress_next_offset_check "
            "consumer_progress_owner_epoch_check consumer_progress_partition_check "
            "consumer_progress_pkey"
        ),
        "an operator's command line on the server; it names the constraint it breaks": (
            "consumer_override_accepted_by_check consumer_override_next_offset_check "
            "consumer_override_one_open consumer_override_partition_check "
            "consumer_override_reason_check"
        ),
        "a generated identity": "consumer_override_pkey outbox_pkey",
        "a header is 1 to 255 visible characters before it gets here "
        "(test_a_key_that_is_none_is_malformed)": "idempotency_idempotency_key_check",
        "inserted with `on conflict do nothing`: it is how a repeat is found": "idempotency_pkey",
        "a scope is a role of ours, or a tenant's id, which is never empty": (
            "idempotency_scope_check"
        ),
        "the status of an answer of ours": "idempotency_status_check",
        "partitions of topics of ours": "outbox_partition_check",
        "the names of files of ours, under an advisory lock": "schema_migrations_pkey",
    }
)

LEDGER: Final[Reasons] = MappingProxyType(
    {
        "a book is locked before it is loaded, and its projections are written by upsert": (
            "accounts_pkey buckets_pkey entries_pkey holds_pkey hub_watermarks_pkey"
        ),
        "opened with their tenant or programme in one transaction, and never closed": (
            "accounts_tenant_id_fkey lots_tenant_id_fkey projects_tenant_id_fkey projects_pkey"
        ),
        "the fold of entries that the core has decided; the core holds the same invariants "
        "(tests/property/test_book)": (
            "books_charged_micro_check books_check books_funded_micro_check books_head_hash_check "
            "books_seq_check books_unfunded_micro_check books_breakage_micro_check "
            "buckets_charged_micro_check buckets_check buckets_check1 buckets_gpu_ns_check "
            "buckets_refunded_micro_check buckets_revision_check lots_check "
            "lots_expired_micro_check lots_kept_micro_check lots_reclaimed_micro_check "
            "holds_check holds_check1 "
            "holds_drawn_micro_check holds_ended_check holds_short_micro_check "
            "charges_name_their_bucket entries_hash_check "
            "entries_seq_check others_name_their_cause postings_are_whole postings_sum_to_zero"
        ),
        "the id is made from (tenant, Idempotency-Key), and the key was taken before": (
            "holds_hold_id_key outcomes_pkey"
        ),
        "a word of the core's": (
            "grants_state_check outcomes_state_check proposals_kind_check proposals_state_check"
        ),
        "inserted with `on conflict do nothing`: it is how a duplicate is found "
        "(integration/ledger/test_grant_files)": "grants_pkey grants_reference_key",
        "a row of a file is refused before, for want of a reference or its length "
        "(unit/ledger/test_grant_files)": "grants_reference_check",
        "a proposal is locked, and what the core decides about it is written at once": (
            "decided_at_some_time decided_by_somebody grants_rejected_at_check "
            "grants_rejected_by_check only_approved_is_entered proposals_check"
        ),
        "an outcome is locked, and what the core decides about it is written at once": (
            "accepted_at_some_time"
        ),
        "a grant's id is made from the command, and is unique without its tenant too": (
            "grants_after_another grants_of_one_tenant outcomes_of_grant"
        ),
        "the id is made from (scope, Idempotency-Key), and the key was taken before": (
            "proposals_pkey"
        ),
        "a sequence gives each number once": (
            "approval_limits_pkey grants_number_key outcomes_number_key proposals_number_key"
        ),
        "of no key, or no amount: 404 and 422 (integration/ledger/test_proposals)": (
            "approval_limits_approve_up_to_micro_check approval_limits_key_id_fkey"
        ),
        "kept by upsert, from metering's topic, which states what is newer": (
            "parked_charges_pkey price_lines_pkey"
        ),
        "metering refuses a negative price before it is published "
        "(integration/metering/test_constraints)": "price_lines_micro_per_gpu_hour_check",
        "what the broker acknowledged, kept by upsert; watermarks are kept once per revision": (
            "published_positions_next_offset_check published_positions_partition_check "
            "published_positions_pkey unpublished_watermarks_pkey"
        ),
        "an operator's command line on the server, which asks for both texts": (
            "recoveries_accepted_by_check recoveries_entries_check recoveries_pkey "
            "recoveries_reason_check"
        ),
        "transaction ids and counts of the sequencer, one process at a time": (
            "sequence_windows_check sequence_windows_entries_check "
            "sequence_windows_first_index_check sequence_windows_follow sequence_windows_open "
            "sequence_windows_pkey"
        ),
    }
)

METERING: Final[Reasons] = MappingProxyType(
    {
        "written by upsert, or under the lock of the node, the source or the record": (
            "allocation_duplicates_pkey allocations_pkey buckets_pkey coverage_pkey "
            "corrections_correction_id_key freed_coverage_pkey hub_partitions_pkey nodes_pkey "
            "quarantine_decisions_pkey quarantine_record "
            "quarantine_time_pkey sources_pkey tallies_pkey tenants_pkey"
        ),
        "what `reconcile` adds up and finds, one run at a time": (
            "booked_books_pkey booked_books_seq_check booked_buckets_pkey bucket_differences_pkey "
            "changed_hours_differences_check changed_hours_pkey "
            "reconcile_runs_differences_check reconcile_runs_found_check reconcile_runs_pkey"
        ),
        "the core states what was decided with its reason, and the API asks for a reason "
        "(tests/unit/metering/test_decisions)": (
            "quarantine_decisions_check quarantine_decisions_check1 quarantine_decisions_check2"
        ),
        "a hub's record is read by narrower bounds; beyond them it is quarantined as `schema` "
        "(tests/property/test_events)": (
            "allocations_reserved_gpu_ms_check coverage_share_ppm_check "
            "freed_coverage_share_ppm_check sources_contiguous_check"
        ),
        "cut by the core at UTC hours and days, summed from 0 up (tests/property/test_coverage, "
        "test_rating)": (
            "allocation_duplicates_duplicate_gpu_ns_check buckets_charge_micro_check "
            "buckets_gpu_ns_check buckets_hour_ms_check buckets_revision_check "
            "buckets_voided_gpu_ns_check coverage_check freed_coverage_check "
            "quarantine_time_hour_ms_check quarantine_time_waiting_gpu_ns_check "
            "tallies_accepted_records_check tallies_duplicate_gpu_ns_check "
            "tallies_duplicate_records_check tallies_hour_ms_check tallies_read_records_check "
            "tallies_reported_gpu_ns_check"
        ),
        "only topics of registered hubs are read, and hubs are never removed": (
            "hub_partitions_hub_fkey hub_partitions_partition_check sources_hub_fkey"
        ),
        "a generated identity": (
            "corrections_counted corrections_pkey freed_time_pkey open_time_pkey "
            "price_lines_generation_key quarantine_pkey sources_arrival_key usage_changes_pkey"
        ),
        "buckets added up by a trigger and a task, in the order of what changed them "
        "(integration/metering/test_usage_sums)": (
            "usage_days_charge_micro_check usage_days_day_ms_check usage_days_gpu_ns_check "
            "usage_days_pkey usage_days_refunded_micro_check usage_days_voided_gpu_ns_check "
            "usage_hours_charge_micro_check usage_hours_gpu_ns_check usage_hours_hour_ms_check "
            "usage_hours_pkey usage_hours_refunded_micro_check usage_hours_voided_gpu_ns_check"
        ),
        "lines are added with their list, in one transaction": "price_lines_price_version_fkey",
        "a word of the core's; a record that is no longer open is refused with 409 "
        "`quarantine-closed`": "quarantine_check quarantine_state_check sources_standing_check",
        "the core decides about a correction once, and gives it its revision then "
        "(tests/unit/metering/test_proposals)": (
            "corrections_check1 corrections_check2 corrections_check3 corrections_revision_check "
            "corrections_state_check"
        ),
        "the span of a correction that was read, with its end after its start": "freed_time_check",
        "written with its record, which is never deleted": "quarantine_time_quarantine_id_fkey",
    }
)

INVOICING: Final[Reasons] = MappingProxyType(
    {
        "what a bill goes through is the job's, under the lock of its month": (
            "bills_check bills_last_seq_check bills_period_fkey bills_state_check"
        ),
        "kept from the ledger's topic by upsert, or found and left": (
            "books_check books_contiguous_seq_check books_pkey entries_pkey month_usage_check "
            "month_usage_pkey tenants_pkey watermarks_partition_check watermarks_pkey"
        ),
        "entries of the ledger, read by its contract": (
            "charge_is_whole entries_entry_hash_check entries_period_check entries_seq_check "
            "invoiced_is_whole"
        ),
        "numbered under the lock of their month; an override has a reason or is none": (
            "closing_resumptions_failed_count_check "
            "closing_resumptions_override_reason_check closing_resumptions_period_fkey "
            "closing_resumptions_pkey closing_resumptions_resumption_check"
        ),
        "written by upsert when a month is closed or a number taken": (
            "invoice_series_closings_count_check invoice_series_pkey"
        ),
        "without a seller a month is blocked, and sellers are never removed": (
            "closings_legal_entity_id_fkey invoice_counters_legal_entity_id_fkey "
            "invoice_series_legal_entity_id_fkey invoices_legal_entity_id_fkey"
        ),
        "numbered by the job under the counter's lock; every document is computed by the core": (
            "follows_its_predecessor invoice_counters_last_position_check invoice_counters_pkey "
            "invoices_content_sha256_check invoices_period_fkey invoices_pkey "
            "invoices_position_check lines_add_up no_gap one_invoice_per_month one_number_each "
            "one_place_each says_what_it_is totals_add_up"
        ),
        "steps and PDFs of a numbered invoice, written by the job": (
            "invoice_pdfs_check invoice_pdfs_invoice_id_fkey invoice_pdfs_pkey "
            "invoice_steps_check invoice_steps_invoice_id_fkey invoice_steps_pkey "
            "invoice_steps_step_check"
        ),
        "the default of a column that no request names": "legal_entities_series_check",
        "counted by the core under the lock of the register": (
            "tax_rates_pkey tax_rates_tax_version_check"
        ),
    }
)

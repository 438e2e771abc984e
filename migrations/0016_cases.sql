-- Cases of a run: inputs that its program is run with one after another, and what came of each.

-- How they are judged; null: the run has none.
alter table sandboxes add column judging jsonb;

create table run_cases (
    run uuid not null references sandboxes on delete cascade,
    index integer not null check (index >= 0),
    name text,
    -- What it is given and what is expected of it, until the end of the run.
    stdin bytea,
    expected bytea,
    verdict text check (verdict in ('accepted', 'wrong_output', 'failed')),
    outcome jsonb,
    -- Exact usage, for the ledger.
    used jsonb,
    started_at timestamptz,
    -- The beginning of each stream, and how much of what was kept stands behind it.
    stdout bytea,
    stderr bytea,
    stdout_omitted_bytes bigint not null default 0 check (stdout_omitted_bytes >= 0),
    stderr_omitted_bytes bigint not null default 0 check (stderr_omitted_bytes >= 0),
    primary key (run, index),
    constraint run_cases_final check (
        (verdict is null) = (outcome is null) and (verdict is null) = (used is null)
        and (verdict is null) = (stdout is null) and (verdict is null) = (stderr is null)
    )
);

-- Compressing it would hold up whoever admits for the same tenant, and it is gone at the end of the run.
alter table run_cases
    alter stdin set storage external,
    alter expected set storage external;

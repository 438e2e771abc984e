-- Runs with a compile step: what it runs, within which limits, and how it ended. What the run takes up is then what either step does.

alter table sandboxes
    add column compile jsonb,
    add column compile_outcome jsonb,
    add column compile_log_tail bytea,
    -- Kept output that could not be read when the end was stored.
    add column compile_stdout_omitted_bytes bigint not null default 0,
    add column compile_stderr_omitted_bytes bigint not null default 0;

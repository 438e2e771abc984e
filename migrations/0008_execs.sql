-- Further processes in sandboxes. They end and go with their sandbox.

create table execs (
    id uuid primary key,
    sandbox uuid not null references sandboxes on delete cascade,
    tenant text not null,
    principal text not null,
    state text not null check (state in ('starting', 'running', 'exited', 'failed')),
    -- What is started: command, environment, folder, user, input, terminal, limits.
    plan jsonb not null,
    created_at timestamptz not null,
    started_at timestamptz,
    finished_at timestamptz,
    outcome jsonb,
    -- As a sandbox's.
    log_tail bytea,
    stdout_omitted_bytes bigint not null default 0 check (stdout_omitted_bytes >= 0),
    stderr_omitted_bytes bigint not null default 0 check (stderr_omitted_bytes >= 0),
    has_log_file boolean not null default false,
    constraint execs_final check ((state in ('exited', 'failed')) = (outcome is not null) and (outcome is null) = (finished_at is null))
);

create index execs_sandbox on execs (sandbox, id desc);
-- What goes on, and whose end is to be stored.
create index execs_live on execs (sandbox) where outcome is null;
create index execs_kept_log on execs (finished_at) where has_log_file;
create index execs_finished on execs (finished_at) where outcome is not null;

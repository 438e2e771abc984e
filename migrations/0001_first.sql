-- The first schema: who asks, what runs, on which node, what it used, what is to be told of it.

create table tenants (
    id text primary key check (id ~ '^[A-Za-z0-9._@:-]{1,128}$'),
    created_at timestamptz not null
);

create table nodes (
    id uuid primary key,
    -- One keeper on one machine: its host name and its data folder.
    name text not null unique check (length(name) between 1 and 1024),
    memory_bytes bigint not null check (memory_bytes > 0),
    cpu_millis bigint not null check (cpu_millis > 0),
    started_at timestamptz not null
);

create table images (
    id uuid primary key,
    -- Null: shared by all tenants.
    tenant text references tenants,
    reference text not null check (length(reference) between 1 and 256),
    digest text not null check (digest ~ '^sha256:[0-9a-f]{64}$'),
    -- The unpacked root in the keeper's store.
    root text not null check (root ~ '^[0-9a-f]{64}$'),
    -- The image's configuration as the OCI image specification has it.
    config jsonb not null,
    size_bytes bigint not null check (size_bytes >= 0),
    created_at timestamptz not null
);

create unique index images_reference on images (coalesce(tenant, ''), reference);
create index images_root on images (root);

create table sandboxes (
    id uuid primary key,
    tenant text not null references tenants,
    principal text not null,
    kind text not null check (kind in ('run', 'sandbox')),
    state text not null check (state in ('queued', 'starting', 'running', 'exited', 'failed')),
    name text check (length(name) between 1 and 63),
    image_reference text not null,
    image_digest text not null,
    image_root text not null,
    -- Image and request put together: arguments, environment, folder, user.
    program jsonb not null,
    limits jsonb not null,
    output_policy text not null check (output_policy in ('truncate', 'kill', 'discard')),
    labels jsonb not null default '{}',
    -- What admission counts.
    memory_bytes bigint not null check (memory_bytes > 0),
    cpu_millis bigint not null check (cpu_millis > 0),
    node uuid references nodes,
    created_at timestamptz not null,
    claimed_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz,
    expires_at timestamptz,
    outcome jsonb,
    reason text,
    -- The last records of its log, and what stands before them.
    log_tail bytea,
    stdout_omitted_bytes bigint not null default 0 check (stdout_omitted_bytes >= 0),
    stderr_omitted_bytes bigint not null default 0 check (stderr_omitted_bytes >= 0),
    -- Whether its node still has the whole log after the end, and until when; null: until it is deleted.
    has_log_file boolean not null default false,
    log_expires_at timestamptz,
    constraint sandboxes_claimed check (state = 'queued' or state = 'failed' or (node is not null and claimed_at is not null)),
    constraint sandboxes_final check ((state in ('exited', 'failed')) = (outcome is not null)),
    constraint sandboxes_outcome check ((outcome is null) = (reason is null) and (outcome is null) = (finished_at is null))
);

create unique index sandboxes_name on sandboxes (tenant, name) where name is not null;
create index sandboxes_list on sandboxes (tenant, id desc) where kind = 'sandbox';
-- The hot questions look at live rows only, so finished ones cost nothing.
create index sandboxes_queued on sandboxes (tenant, created_at, id) where state = 'queued';
create index sandboxes_live on sandboxes (node) where state in ('starting', 'running');
create index sandboxes_kept_log on sandboxes (node, log_expires_at) where has_log_file;

-- What a queued sandbox is to be given; a claimed one has it already.
create table inputs (
    sandbox uuid primary key references sandboxes on delete cascade,
    -- Entries of the file format that the keeper takes.
    files bytea,
    stdin bytea
);

-- The ledger: one line for each sandbox that ended, written with its outcome, never changed.
create table usage (
    sandbox uuid primary key,
    tenant text not null references tenants,
    principal text not null,
    kind text not null check (kind in ('run', 'sandbox')),
    wall_us bigint not null check (wall_us >= 0),
    cpu_us bigint not null check (cpu_us >= 0),
    memory_peak_bytes bigint not null check (memory_peak_bytes >= 0),
    memory_limit_bytes bigint not null check (memory_limit_bytes > 0),
    output_bytes bigint not null check (output_bytes >= 0),
    ended_at timestamptz not null
);

create index usage_tenant on usage (tenant, ended_at);

-- The outbox: what happened, in order, to be told to whoever listens.
create table events (
    id bigint generated always as identity primary key,
    tenant text not null,
    sandbox uuid not null,
    kind text not null check (kind in ('sandbox.ended', 'sandbox.deleted')),
    at timestamptz not null,
    data jsonb not null
);

create index events_tenant on events (tenant, id);

-- Pools: sandboxes of a tenant's that are started before somebody asks for them. One that waits is of the kind `pooled`; whoever takes it makes it a `sandbox` of
-- his own.

create table pools (
    id uuid primary key,
    tenant text not null references tenants,
    -- Who made it: what waits in it counts as theirs.
    principal text not null,
    name text not null check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    size integer not null check (size >= 0),
    -- JSON, as it was asked for. Not `jsonb`: what is in its files may hold a zero.
    template bytea not null,
    -- When one of its sandboxes is ready: as soon as its program has written this, within so long; null: as soon as it runs.
    ready_output text,
    ready_within_ms bigint not null check (ready_within_ms > 0),
    -- How many were taken, and how many requests found none ready.
    taken bigint not null default 0,
    missed bigint not null default 0,
    -- How many came to nothing before they were taken, and what is known of the last one.
    failures bigint not null default 0,
    last_failure jsonb,
    created_at timestamptz not null
);

create unique index pools_name on pools (tenant, name);

-- What waits in a pool, or will as soon as it is ready.
create table pool_members (
    sandbox uuid primary key references sandboxes on delete cascade,
    pool uuid not null references pools on delete cascade,
    ready_at timestamptz
);

create index pool_members_pool on pool_members (pool);

alter table sandboxes
    drop constraint sandboxes_kind_check,
    add constraint sandboxes_kind_check check (kind in ('run', 'sandbox', 'pooled')),
    -- The name that its pool had, and for how long it had run when it was taken from there.
    add column from_pool text,
    add column waited_ms bigint not null default 0 check (waited_ms >= 0);

create index sandboxes_pooled on sandboxes (id) where kind = 'pooled';

-- What waited, whatever became of it, has lines of its own.
alter table usage
    drop constraint usage_kind_check,
    add constraint usage_kind_check check (kind in ('run', 'sandbox', 'pooled'));

alter table usage_hours
    drop constraint usage_hours_kind_check,
    add constraint usage_hours_kind_check check (kind in ('run', 'sandbox', 'pooled'));

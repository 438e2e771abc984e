-- Tenants and principals with their quotas and what they use; who did what; usage by the hour.

alter table tenants
    -- The names that tokens may hold, also those of issuers that put a bar into them.
    drop constraint tenants_id_check,
    add constraint tenants_id_check check (id ~ '^[A-Za-z0-9._@:|+-]{1,128}$'),
    -- Share of a full node, beside other tenants'.
    add column weight integer not null default 100 check (weight between 1 and 10000),
    -- What differs from the defaults: a number, a list, or null for no limit.
    add column quotas jsonb not null default '{}' check (jsonb_typeof(quotas) = 'object'),
    -- The same for each of its principals.
    add column principal_quotas jsonb not null default '{}' check (jsonb_typeof(principal_quotas) = 'object'),
    add column suspended_at timestamptz,
    -- Whether its suspension also ends what it has running and waiting.
    add column stops boolean not null default false,
    -- What is in use. Written only together with what it counts, so that quotas are decided by this row, under its lock.
    add column live bigint not null default 0,
    add column live_memory_bytes bigint not null default 0,
    add column live_cpu_millis bigint not null default 0,
    add column queued bigint not null default 0,
    add column log_bytes bigint not null default 0,
    add column image_bytes bigint not null default 0,
    -- Token bucket: millionths of a run that were left at a time; no time: it is full.
    add column bucket_micros bigint not null default 0,
    add column bucket_at timestamptz,
    -- What was used on this day, of UTC.
    add column day date not null default '1970-01-01',
    add column day_runs bigint not null default 0,
    add column day_cpu_us bigint not null default 0;

create table principals (
    tenant text not null references tenants,
    name text not null check (name ~ '^[A-Za-z0-9._@:|+-]{1,128}$'),
    created_at timestamptz not null,
    quotas jsonb not null default '{}' check (jsonb_typeof(quotas) = 'object'),
    suspended_at timestamptz,
    stops boolean not null default false,
    live bigint not null default 0,
    live_memory_bytes bigint not null default 0,
    live_cpu_millis bigint not null default 0,
    queued bigint not null default 0,
    log_bytes bigint not null default 0,
    bucket_micros bigint not null default 0,
    bucket_at timestamptz,
    day date not null default '1970-01-01',
    day_runs bigint not null default 0,
    day_cpu_us bigint not null default 0,
    primary key (tenant, name)
)
-- Changed with every run: with room in the page a change needs no new entry in the index (heap-only tuples).
with (fillfactor = 50);

alter table tenants set (fillfactor = 50);

-- Kept of its output, beside the outcome and on its node: what the quota of log bytes counts.
alter table sandboxes add column log_bytes bigint not null default 0 check (log_bytes >= 0);

update sandboxes set log_bytes = coalesce(octet_length(log_tail), 0) + stdout_omitted_bytes + stderr_omitted_bytes
where state in ('exited', 'failed');

-- What was there before it was counted.
insert into principals (tenant, name, created_at)
select tenant, principal, min(created_at) from sandboxes group by tenant, principal;

update tenants
set live = counted.live, live_memory_bytes = counted.memory_bytes, live_cpu_millis = counted.cpu_millis, queued = counted.queued,
    log_bytes = counted.log_bytes
from (
    select tenant, count(*) filter (where outcome is null) as live, coalesce(sum(memory_bytes) filter (where outcome is null), 0) as memory_bytes,
        coalesce(sum(cpu_millis) filter (where outcome is null), 0) as cpu_millis, count(*) filter (where state = 'queued') as queued,
        sum(log_bytes) as log_bytes
    from sandboxes
    group by tenant
) as counted
where tenants.id = counted.tenant;

update principals
set live = counted.live, live_memory_bytes = counted.memory_bytes, live_cpu_millis = counted.cpu_millis, queued = counted.queued,
    log_bytes = counted.log_bytes
from (
    select tenant, principal, count(*) filter (where outcome is null) as live,
        coalesce(sum(memory_bytes) filter (where outcome is null), 0) as memory_bytes,
        coalesce(sum(cpu_millis) filter (where outcome is null), 0) as cpu_millis, count(*) filter (where state = 'queued') as queued,
        sum(log_bytes) as log_bytes
    from sandboxes
    group by tenant, principal
) as counted
where principals.tenant = counted.tenant and principals.name = counted.principal;

update tenants
set image_bytes = counted.bytes
from (select tenant, sum(size_bytes) as bytes from images where tenant is not null group by tenant) as counted
where tenants.id = counted.tenant;

-- Each line of the ledger is folded into its hour later; until then it stands for itself.
alter table usage
    add column log_bytes bigint not null default 0 check (log_bytes >= 0),
    add column network_bytes bigint not null default 0 check (network_bytes >= 0);

create index usage_ended_at on usage (ended_at);

create table usage_hours (
    tenant text not null references tenants,
    hour timestamptz not null,
    principal text not null,
    kind text not null check (kind in ('run', 'sandbox')),
    runs bigint not null,
    wall_us numeric not null,
    cpu_us numeric not null,
    -- Memory limit times wall time.
    memory_byte_us numeric not null,
    output_bytes numeric not null,
    log_bytes numeric not null,
    network_bytes numeric not null,
    primary key (tenant, hour, principal, kind)
);

-- Who did what to which object. The outbox is a part of it.
alter table events
    alter column tenant drop not null,
    alter column sandbox drop not null,
    drop constraint events_kind_check,
    add constraint events_kind_check check (kind ~ '^[a-z]+\.[a-z_]+$'),
    -- As in `image/python:3`; null: the sandbox.
    add column object text,
    -- Who did it; null: the service itself.
    add column actor_tenant text,
    add column actor text;

-- A queue is looked at by who waits in it, in order of arrival.
create index sandboxes_queue on sandboxes (tenant, principal, created_at, id) where state = 'queued';
drop index sandboxes_queued;

-- Every tenant's, newest first.
create index tenants_queued on tenants (id) where queued > 0;

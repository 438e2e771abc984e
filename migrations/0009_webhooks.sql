-- Events that are followed as they come, and webhooks that they are sent to.

alter table events
    -- The transaction that wrote it. Ids are given before transactions commit, in any order: who follows goes by this number, and no
    -- further than to the oldest transaction that still runs. What was there before has that of this migration.
    add column xact bigint not null default pg_current_xact_id()::text::bigint;

-- In the order in which they are followed and listed: a tenant's, and all.
drop index events_tenant;
create index events_tenant on events (tenant, xact, id);
create index events_order on events (xact, id);

create table webhooks (
    id uuid primary key,
    tenant text not null references tenants,
    url text not null check (length(url) <= 2048),
    -- As in `sandbox.ended` or `sandbox.*`; empty: all.
    kinds text[] not null,
    description text not null,
    is_active boolean not null,
    -- Its secret is made of the service's key, its id and this number; nothing here can be signed with. The one before is good until then.
    secret_version integer not null default 1 check (secret_version >= 1),
    former_secret_until timestamptz,
    -- Which key of a service that was: a node with another one leaves it to others.
    key_id text not null,
    created_at timestamptz not null,
    -- The transaction that made it: what others wrote before does not concern it.
    xact bigint not null default pg_current_xact_id()::text::bigint,
    -- Since when every attempt has failed.
    failing_since timestamptz,
    -- When it was made inactive for that.
    disabled_at timestamptz,
    -- The request that gave it its present secret, if it had a name.
    rotated_by text,
    -- Events of which no delivery was made because too many were waiting.
    dropped bigint not null default 0 check (dropped >= 0)
);

create index webhooks_tenant on webhooks (tenant, id);

-- What is to be sent, is being sent, and was sent or given up.
create table webhook_deliveries (
    id uuid primary key,
    webhook uuid not null references webhooks on delete cascade,
    tenant text not null,
    -- The event; null: it is a test.
    event bigint,
    kind text not null,
    -- Exactly what is signed.
    body text not null,
    state text not null check (state in ('pending', 'delivered', 'failed')),
    created_at timestamptz not null,
    -- When it is tried next. While somebody tries it: when others may, because nothing was heard of them.
    next_at timestamptz not null,
    -- No attempt begins later.
    give_up_at timestamptz not null,
    ended_at timestamptz,
    -- How many were begun, and how each that is known ended: number, at, ms, status, error.
    attempt_count integer not null default 0,
    attempts jsonb not null default '[]',
    -- How many were before it was begun anew.
    attempts_before integer not null default 0,
    -- The beginning of the last answer's body.
    response text,
    unique (webhook, event)
);

create index webhook_deliveries_log on webhook_deliveries (webhook, id);
-- Also walked from webhook to webhook: only of those that have something is anything looked up.
create index webhook_deliveries_due on webhook_deliveries (webhook, next_at) where state = 'pending';
create index webhook_deliveries_ended on webhook_deliveries (ended_at) where state <> 'pending';

-- How far deliveries were made of the events, under whose lock they are made.
create table webhook_position (
    is_only boolean primary key default true check (is_only),
    xact bigint not null,
    id bigint not null default 0,
    -- The largest id of an event that was looked at.
    id_max bigint not null default 0
);

insert into webhook_position (xact) values (pg_current_xact_id()::text::bigint);

-- Volumes, each on one node, and which sandboxes have them.

create table volumes (
    id uuid primary key,
    tenant text not null references tenants,
    principal text not null,
    name text not null check (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$'),
    -- Whose disk it is on.
    node uuid not null references nodes,
    -- `making`: its node does not have it yet. `removing`: its name is free, and its node is still to remove it.
    state text not null check (state in ('making', 'ready', 'removing')),
    size_bytes bigint not null check (size_bytes > 0),
    labels jsonb not null default '{}',
    created_at timestamptz not null
);

create unique index volumes_name on volumes (tenant, name) where state <> 'removing';
-- Also what the quotas count.
create index volumes_list on volumes (tenant, id);
create index volumes_of_node on volumes (node) where state <> 'ready';

-- A sandbox that has ended and cannot be started again holds none of its volumes any more; its rows stay as long as it does.
create table mounts (
    sandbox uuid not null references sandboxes on delete cascade,
    volume uuid not null references volumes on delete cascade,
    primary key (sandbox, volume)
);

create index mounts_volume on mounts (volume);

-- The only node that can run it: its volumes are there.
alter table sandboxes add column wanted_node uuid references nodes;

-- Sandboxes that keep what they wrote when they end, and can be started again.

alter table sandboxes
    add column keep_layer boolean not null default false,
    -- Counted from one.
    add column starts integer not null default 1 check (starts >= 1);

create index sandboxes_kept_layer on sandboxes (tenant) where keep_layer;

-- A line for each life.
alter table usage
    add column claims bigint not null default 0,
    drop constraint usage_pkey,
    add primary key (sandbox, claims);

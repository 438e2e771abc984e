-- Who may write for a node, nodes that are to take nothing more, and runs that are tried again.

alter table nodes
    -- One more with every process that takes the node, and when others find it dead: what an earlier holder writes then changes nothing.
    add column epoch bigint not null default 0 check (epoch >= 0),
    -- Until when it counts as alive, by the clock of this server: the nodes' own may differ.
    add column lease_until timestamptz not null default 'epoch',
    -- Since when it takes no more work, and when what still lives there is ended.
    add column drained_at timestamptz,
    add column evict_at timestamptz,
    add constraint nodes_evict check (evict_at is null or drained_at is not null);

alter table sandboxes
    -- The epoch of its node in which it was claimed, or last taken over.
    add column epoch bigint not null default 0 check (epoch >= 0),
    -- How often it was claimed: what was begun for an earlier claim may not be written over a later one.
    add column claims bigint not null default 0 check (claims >= 0),
    -- Whether what it is to be given can be had again from here.
    add column keeps_input boolean not null default false,
    -- Counted from one.
    add column attempt integer not null default 1 check (attempt >= 1),
    -- How often it may still be tried again after this machine's failure.
    add column retries_left integer not null default 0 check (retries_left >= 0),
    -- The node that failed it last does not take it again before then, if another could.
    add column failed_node uuid references nodes,
    add column failed_until timestamptz;

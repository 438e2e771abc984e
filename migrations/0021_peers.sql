-- Where other nodes reach a node, how they prove to it that they are nodes, and how much of it is promised.

alter table nodes
    -- Where its API is for the other nodes; null: it is not reached by them, and reaches none.
    add column peer_address text,
    -- Made anew with each start. Who sends it reads this table, and so is a node.
    add column peer_key text,
    -- As the node last said with its lease.
    add column committed_memory_bytes bigint not null default 0 check (committed_memory_bytes >= 0),
    add column committed_cpu_millis bigint not null default 0 check (committed_cpu_millis >= 0),
    add constraint nodes_peer check ((peer_address is null) = (peer_key is null));

-- By which name and password tenants are known to registries.

create table registry_logins (
    tenant text not null references tenants,
    -- As people know it: its host, with its port if that is not the usual one.
    registry text not null check (length(registry) between 1 and 300),
    username text not null,
    -- The password, sealed with a key that is not here, and bound to all three above.
    sealed bytea not null,
    -- Which key of a service that was: a node with another one cannot read it.
    key_id text not null,
    changed_at timestamptz not null,
    primary key (tenant, registry)
);

-- Requests that may be sent again: who works on which, and what was answered.

create table idempotency_keys (
    tenant text not null,
    principal text not null,
    key text not null check (key ~ '^[!-~]{1,255}$'),
    -- SHA-256 of method and target, and of the body. Null: a body that nobody has read to its end yet.
    target bytea not null check (length(target) = 32),
    body bytea check (length(body) = 32),
    -- Who works on it, and since when: one attempt of one process of one node. No holder: nobody does.
    node uuid not null,
    process uuid not null,
    holder uuid,
    taken_at timestamptz not null,
    -- What it made: written with the sandbox itself, so that no second attempt makes another.
    sandbox uuid,
    -- What was answered; no text: it is told again from the sandbox.
    status smallint check (status between 200 and 499),
    content_type text,
    location text,
    answer bytea,
    expires_at timestamptz not null,
    primary key (tenant, principal, key)
)
-- Changed twice after it was inserted, never in an indexed column: with room in the page that needs no new entry in an index.
with (fillfactor = 70);

create index idempotency_keys_expires_at on idempotency_keys (expires_at);

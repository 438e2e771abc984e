-- Sandboxes that are paused, that end when they do nothing, that are removed when they have ended; and how lists are looked through.

alter table sandboxes
    drop constraint sandboxes_state_check,
    add constraint sandboxes_state_check check (state in ('queued', 'starting', 'running', 'paused', 'exited', 'failed')),
    -- `expires_at` is so long after the creation, or after a change.
    add column ttl_ms bigint check (ttl_ms > 0),
    add column idle_timeout_ms bigint check (idle_timeout_ms > 0),
    add column auto_remove boolean not null default false;

update sandboxes set ttl_ms = greatest(1, (extract(epoch from expires_at - created_at) * 1000)::bigint) where expires_at is not null;

drop index sandboxes_live;
create index sandboxes_live on sandboxes (node) where state in ('starting', 'running', 'paused');

-- Those that somebody should have removed by now.
create index sandboxes_to_remove on sandboxes (finished_at) where auto_remove and state in ('exited', 'failed');

-- Lists: of what lives, by label, by image, by time of the end. By name and its beginning, where there is one.
create index sandboxes_live_list on sandboxes (tenant, id desc) where kind = 'sandbox' and state in ('queued', 'starting', 'running', 'paused');
create index sandboxes_labels on sandboxes using gin (labels) where kind = 'sandbox';
create index sandboxes_image on sandboxes (tenant, image_reference, id desc) where kind = 'sandbox';
create index sandboxes_finished on sandboxes (tenant, finished_at) where kind = 'sandbox' and finished_at is not null;
create index sandboxes_name_prefix on sandboxes (tenant, name text_pattern_ops) where name is not null;

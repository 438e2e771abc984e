-- How far events are not kept any more: who goes on from before that has missed some.
create table events_pruned (
    is_only boolean primary key default true check (is_only),
    xact bigint not null default 0,
    id bigint not null default 0
);

insert into events_pruned default values;

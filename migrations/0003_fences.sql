-- What stood around a payload: bit n for the fence at place n of `Fence::ALL`. Null: it never started, or did before this was noted.

alter table sandboxes add column fences integer;

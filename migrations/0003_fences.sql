-- What stood around a payload: bit n for the fence at place n of the list in docs/security.md. Null: it never started.

alter table sandboxes add column fences integer;

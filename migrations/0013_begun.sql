-- What must not be done twice: which attempt began it. With no answer kept, nobody knows whether it was done.

alter table idempotency_keys add column begun_by uuid;

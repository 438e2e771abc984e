-- Where images came from: what was pulled can be pulled again, and is given up first where room is short.

alter table images add column pulled_from text check (length(pulled_from) between 1 and 1024);

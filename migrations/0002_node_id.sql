-- A node is known by the id that its data folder keeps. Its name is for people: it may change with the host, and two may have one name.

alter table nodes drop constraint nodes_name_key;

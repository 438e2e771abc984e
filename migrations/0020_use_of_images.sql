-- When something was last made of an image, without a look at all that ever was. Of its name, which is long, a sum does.
create index sandboxes_of_root on sandboxes (hashtextextended(image_root, 0), created_at);

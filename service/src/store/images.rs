//! Table `images`: which content a tenant means by a reference.

use oci_spec::image::ImageConfiguration;
use serde_json::json;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError, bigint, damaged, events::Act, unsigned};
use crate::sandbox::{Exceeded, ImageId, QuotaScope, Quotas, SandboxId, TenantId};

/// Names that a tenant can have for images: no quota, but a bound that is told like one.
const IMAGES_MAX: u64 = 1000;

/// An image that came in.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// `None`: for all tenants.
    pub tenant: Option<TenantId>,
    pub reference: String,
    /// Of its manifest, as in `sha256:…`.
    pub digest: String,
    /// The unpacked root in the keeper's store.
    pub root: ImageId,
    pub config: ImageConfiguration,
    pub size_bytes: u64,
    pub created_at: OffsetDateTime,
    pub origin: Origin,
}

/// How an image came to have its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Somebody sent an archive.
    Archive,
    /// It is the files of a sandbox.
    Sandbox(SandboxId),
    /// It was pulled as this.
    Registry(String),
    /// It is the image that had this name.
    Image(String),
}

impl Origin {
    /// The event that tells of it, and what that says of it.
    fn told(&self) -> (&'static str, Option<(&'static str, String)>) {
        match self {
            Self::Archive => ("image.imported", None),
            Self::Sandbox(sandbox) => ("image.committed", Some(("sandbox", sandbox.to_string()))),
            Self::Registry(source) => ("image.pulled", Some(("source", source.clone()))),
            Self::Image(reference) => ("image.tagged", Some(("source", reference.clone()))),
        }
    }

    fn pulled_from(&self) -> Option<&str> {
        match self {
            Self::Registry(source) => Some(source),
            Self::Archive | Self::Sandbox(_) | Self::Image(_) => None,
        }
    }
}

/// An image as its tenant sees it.
#[derive(Debug, Clone)]
pub struct Image {
    pub reference: String,
    pub digest: String,
    pub root: ImageId,
    pub config: ImageConfiguration,
    pub size_bytes: u64,
    pub created_at: OffsetDateTime,
    /// Whether it is for all tenants.
    pub is_shared: bool,
    /// What it was pulled as, if it was.
    pub pulled_from: Option<String>,
}

/// What became of an image that was to be recorded.
#[derive(Debug, Clone)]
pub enum Recorded {
    Yes {
        image: Box<Image>,
        /// The root that the reference named before, if that was another.
        replaced: Option<ImageId>,
    },
    Exceeded(Exceeded),
    /// No reference names any more what was to get another name.
    Gone,
}

struct Row {
    tenant: Option<String>,
    reference: String,
    digest: String,
    root: String,
    config: Json<ImageConfiguration>,
    size_bytes: i64,
    created_at: OffsetDateTime,
    pulled_from: Option<String>,
}

impl Row {
    fn read(self) -> Result<Image, StoreError> {
        Ok(Image {
            is_shared: self.tenant.is_none(),
            reference: self.reference,
            digest: self.digest,
            root: self.root.try_into().map_err(damaged)?,
            config: self.config.0,
            size_bytes: unsigned(self.size_bytes),
            created_at: self.created_at,
            pulled_from: self.pulled_from,
        })
    }
}

impl Store {
    /// Makes the reference name this image from now on, for its tenant or for all, unless its tenant has no room for it. What has a name already is not given up until it has this one, too.
    pub async fn record_image(&self, image: &NewImage, defaults: &Quotas, act: &Act<'_>) -> Result<Recorded, StoreError> {
        let mut transaction = self.pool.begin().await?;
        if let Some(tenant) = &image.tenant {
            sqlx::query!("insert into tenants (id, created_at) values ($1, $2) on conflict do nothing", tenant.as_str(), image.created_at)
                .execute(&mut *transaction)
                .await?;
            let locked = sqlx::query!(
                r#"select quotas as "quotas: Json<Quotas>", image_bytes from tenants where id = $1 for no key update"#,
                tenant.as_str()
            )
            .fetch_one(&mut *transaction)
            .await?;
            let replaced =
                sqlx::query_scalar!("select size_bytes from images where tenant = $1 and reference = $2", tenant.as_str(), image.reference)
                    .fetch_optional(&mut *transaction)
                    .await?;
            let others = sqlx::query_scalar!(
                r#"select count(*) as "count!" from images where coalesce(tenant, '') = $1 and reference <> $2"#,
                tenant.as_str(),
                image.reference
            )
            .fetch_one(&mut *transaction)
            .await?;
            if unsigned(others) >= IMAGES_MAX {
                return Ok(Recorded::Exceeded(too_many(unsigned(others))));
            }
            let used = locked.image_bytes - replaced.unwrap_or(0);
            let after = used.saturating_add(bigint(image.size_bytes));
            if let Some(limit) = locked.quotas.0.over(defaults).number("image_bytes")
                && unsigned(after) > limit
            {
                return Ok(Recorded::Exceeded(exceeded(limit, locked.image_bytes)));
            }
            sqlx::query!("update tenants set image_bytes = $2 where id = $1", tenant.as_str(), after).execute(&mut *transaction).await?;
        }
        let root = image.root.to_string();
        let is_named_anew = matches!(image.origin, Origin::Image(_));
        // All at once, in one order: whoever takes one of them away, or gives one another name, waits for this.
        let held = sqlx::query!(
            r#"select root, coalesce(tenant, '') = coalesce($1, '') and reference = $2 as "is_replaced!" from images
            where coalesce(tenant, '') = coalesce($1, '') and reference = $2 or root = $3 and $4
            order by id for no key update"#,
            image.tenant.as_ref().map(TenantId::as_str),
            image.reference,
            root,
            is_named_anew,
        )
        .fetch_all(&mut *transaction)
        .await?;
        if is_named_anew && held.iter().all(|held| held.root != root) {
            return Ok(Recorded::Gone);
        }
        let replaced = held.into_iter().find(|held| held.is_replaced).map(|held| held.root);
        let row = sqlx::query_as!(
            Row,
            r#"insert into images (id, tenant, reference, digest, root, config, size_bytes, created_at, pulled_from)
            values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
            on conflict (coalesce(tenant, ''), reference) do update
            set digest = excluded.digest, root = excluded.root, config = excluded.config,
                size_bytes = excluded.size_bytes, created_at = excluded.created_at, pulled_from = excluded.pulled_from
            returning tenant, reference, digest, root, config as "config: Json<ImageConfiguration>", size_bytes, created_at, pulled_from"#,
            Uuid::now_v7(),
            image.tenant.as_ref().map(TenantId::as_str),
            image.reference,
            image.digest,
            root,
            Json(&image.config) as _,
            bigint(image.size_bytes),
            image.created_at,
            image.origin.pulled_from(),
        )
        .fetch_one(&mut *transaction)
        .await?;
        let mut act = Act { data: json!({ "digest": image.digest, "size_bytes": image.size_bytes }), ..act.clone() };
        let (kind, more) = image.origin.told();
        if let Some((name, value)) = more {
            act.data[name] = value.into();
        }
        let object = format!("image/{}", image.reference);
        super::events::tell(&mut transaction, image.tenant.as_ref(), kind, Some(&object), &act).await?;
        transaction.commit().await?;
        let replaced = replaced.filter(|replaced| *replaced != root).map(ImageId::try_from).transpose().map_err(damaged)?;
        row.read().map(|image| Recorded::Yes { image: Box::new(image), replaced })
    }

    /// How many bytes an image of the tenant's may have that is to take this reference, as things are now: for whoever wants to know before there is one. `None`: as
    /// many as it likes. Beyond that, what [`Store::record_image`] would say.
    pub async fn image_room(&self, tenant: &TenantId, reference: &str, defaults: &Quotas) -> Result<Option<(u64, Exceeded)>, StoreError> {
        let row = sqlx::query!(
            r#"select quotas as "quotas: Json<Quotas>", image_bytes,
                (select size_bytes from images where images.tenant = tenants.id and reference = $2) as replaced_bytes
            from tenants where id = $1"#,
            tenant.as_str(),
            reference,
        )
        .fetch_optional(&self.pool)
        .await?;
        let limit = row.as_ref().map_or_else(|| defaults.number("image_bytes"), |row| row.quotas.0.over(defaults).number("image_bytes"));
        let Some(limit) = limit else { return Ok(None) };
        let (used, replaced) = row.map_or((0, 0), |row| (row.image_bytes, row.replaced_bytes.unwrap_or(0)));
        Ok(Some((limit.saturating_sub(unsigned(used.saturating_sub(replaced))), exceeded(limit, used))))
    }

    /// What the tenant means by this reference: its own image, else the shared one.
    pub async fn find_image(&self, tenant: &TenantId, reference: &str) -> Result<Option<Image>, StoreError> {
        sqlx::query_as!(
            Row,
            r#"select tenant, reference, digest, root, config as "config: Json<ImageConfiguration>", size_bytes, created_at, pulled_from
            from images
            where reference = $2 and coalesce(tenant, '') in ($1, '')
            order by tenant nulls last
            limit 1"#,
            tenant.as_str(),
            reference,
        )
        .fetch_optional(&self.pool)
        .await?
        .map(Row::read)
        .transpose()
    }

    /// Every image that the tenant can use, by reference, its own before a shared one of the same reference.
    pub async fn list_images(&self, tenant: &TenantId) -> Result<Vec<Image>, StoreError> {
        sqlx::query_as!(
            Row,
            r#"select tenant, reference, digest, root, config as "config: Json<ImageConfiguration>", size_bytes, created_at, pulled_from
            from images
            where coalesce(tenant, '') in ($1, '')
            order by reference, tenant nulls last"#,
            tenant.as_str(),
        )
        .fetch_all(&self.pool)
        .await?
        .into_iter()
        .map(Row::read)
        .collect()
    }

    /// The roots of every image that the tenant can use, each once.
    pub async fn image_roots(&self, tenant: &TenantId) -> Result<Vec<ImageId>, StoreError> {
        let roots = sqlx::query_scalar!("select distinct root from images where coalesce(tenant, '') in ($1, '')", tenant.as_str());
        roots.fetch_all(&self.pool).await?.into_iter().map(|root| root.try_into().map_err(damaged)).collect()
    }

    /// Takes the reference away, the tenant's own or — `None` — the shared one. Answers what it named.
    pub async fn remove_image(&self, tenant: Option<&TenantId>, reference: &str, act: &Act<'_>) -> Result<Option<Image>, StoreError> {
        let (actor_tenant, actor) = act.names();
        sqlx::query_as!(
            Row,
            r#"with owner as (
                -- before the image, always: whoever makes a sandbox has that lock first, too
                select id from tenants where id = $1 for no key update
            ), gone as (
                delete from images
                where coalesce(tenant, '') = coalesce($1, '') and reference = $2 and (select count(*) from owner) >= 0
                returning tenant, reference, digest, root, config, size_bytes, created_at, pulled_from
            ), counted as (
                update tenants set image_bytes = image_bytes - gone.size_bytes from gone where tenants.id = gone.tenant
            ), told as (
                insert into events (tenant, kind, object, at, data, actor_tenant, actor)
                select tenant, 'image.removed', 'image/' || reference, $3, jsonb_build_object('digest', digest) || $6, $4, $5 from gone
            )
            select tenant, reference, digest, root, config as "config: Json<ImageConfiguration>", size_bytes, created_at, pulled_from from gone"#,
            tenant.map(TenantId::as_str),
            reference,
            act.at,
            actor_tenant as _,
            actor as _,
            act.data,
        )
        .fetch_optional(&self.pool)
        .await
        .inspect(|_| self.told())?
        .map(Row::read)
        .transpose()
    }

    /// Notes that what the reference names was pulled again, if that is this root still. `None`: it is not.
    pub async fn touch_image(
        &self,
        tenant: Option<&TenantId>,
        reference: &str,
        root: &ImageId,
        at: OffsetDateTime,
    ) -> Result<Option<Image>, StoreError> {
        sqlx::query_as!(
            Row,
            r#"update images set created_at = greatest(created_at, $4)
            where coalesce(tenant, '') = coalesce($1, '') and reference = $2 and root = $3
            returning tenant, reference, digest, root, config as "config: Json<ImageConfiguration>", size_bytes, created_at, pulled_from"#,
            tenant.map(TenantId::as_str),
            reference,
            root.to_string(),
            at,
        )
        .fetch_optional(&self.pool)
        .await?
        .map(Row::read)
        .transpose()
    }

    /// Those of these roots which all references that name them had from a registry, which no sandbox needs that has yet to end or keeps its layer, and of which none was made since this time: the one
    /// first of which none was made for the longest.
    pub async fn idle_roots(&self, of: &[ImageId], before: OffsetDateTime, limit: u32) -> Result<Vec<ImageId>, StoreError> {
        let of: Vec<_> = of.iter().map(ImageId::to_string).collect();
        let roots = sqlx::query_scalar!(
            r#"with named as (
                select root, max(created_at) as at from images where root = any($1) group by root having bool_and(pulled_from is not null)
            ), used as (
                select root, greatest(at, (
                    select s.created_at from sandboxes s
                    where hashtextextended(s.image_root, 0) = hashtextextended(root, 0) and s.image_root = root
                    order by s.created_at desc limit 1
                )) as at
                from named
            )
            select root as "root!" from used
            where at < $2
                and not exists (select 1 from sandboxes s where s.image_root = root and s.keep_layer)
                and not exists (select 1 from sandboxes s where s.image_root = root and s.state = 'queued')
                and not exists (select 1 from sandboxes s where s.image_root = root and s.state in ('starting', 'running', 'paused'))
            order by at, root
            limit $3"#,
            &of,
            before,
            i64::from(limit),
        )
        .fetch_all(&self.pool)
        .await?;
        roots.into_iter().map(|root| root.try_into().map_err(damaged)).collect()
    }

    /// Takes all references away that name this root, if it is still one of [`Store::idle_roots`]. Answers them.
    pub async fn give_up_root(&self, root: &ImageId, before: OffsetDateTime, act: &Act<'_>) -> Result<Vec<String>, StoreError> {
        let root = root.to_string();
        let mut transaction = self.pool.begin().await?;
        // Tenants before images, always. Who makes a sandbox of it is waited for, and seen by what comes then.
        sqlx::query_scalar!(
            "select id from tenants where id in (select tenant from images where root = $1) order by id for no key update",
            root
        )
        .fetch_all(&mut *transaction)
        .await?;
        sqlx::query_scalar!("select id from images where root = $1 order by id for update", root).fetch_all(&mut *transaction).await?;
        let gone = sqlx::query_scalar!(
            r#"with gone as (
                delete from images
                where root = $1
                    and not exists (select 1 from images i where i.root = $1 and (i.pulled_from is null or i.created_at >= $2))
                    and not exists (
                        select 1 from sandboxes s
                        where hashtextextended(s.image_root, 0) = hashtextextended($1, 0) and s.image_root = $1 and s.created_at >= $2
                    )
                    and not exists (select 1 from sandboxes s where s.image_root = $1 and s.keep_layer)
                    and not exists (select 1 from sandboxes s where s.image_root = $1 and s.state = 'queued')
                    and not exists (select 1 from sandboxes s where s.image_root = $1 and s.state in ('starting', 'running', 'paused'))
                returning tenant, reference, digest, size_bytes
            ), freed as (
                select tenant, sum(size_bytes)::bigint as bytes from gone group by tenant
            ), counted as (
                update tenants set image_bytes = image_bytes - freed.bytes from freed where tenants.id = freed.tenant
            ), told as (
                insert into events (tenant, kind, object, at, data)
                select tenant, 'image.removed', 'image/' || reference, $3, jsonb_build_object('digest', digest) || $4 from gone
            )
            select reference as "reference!" from gone"#,
            root,
            before,
            act.at,
            act.data,
        )
        .fetch_all(&mut *transaction)
        .await?;
        transaction.commit().await.inspect(|()| self.told())?;
        Ok(gone)
    }

    /// Whether a reference still needs this unpacked root, or a sandbox that has yet to end or keeps its layer, which stands over it.
    pub async fn needs_root(&self, root: &ImageId) -> Result<bool, StoreError> {
        let is_needed = sqlx::query_scalar!(
            r#"select exists (select 1 from images where root = $1)
                or exists (select 1 from sandboxes where state = 'queued' and image_root = $1)
                or exists (select 1 from sandboxes where keep_layer and image_root = $1)
                or exists (select 1 from sandboxes where state in ('starting', 'running', 'paused') and image_root = $1) as "is_needed!""#,
            root.to_string(),
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(is_needed)
    }
}

fn exceeded(limit: u64, used_bytes: i64) -> Exceeded {
    Exceeded {
        scope: QuotaScope::Tenant,
        quota: "image_bytes".to_owned(),
        limit: limit.into(),
        used: unsigned(used_bytes).into(),
        retry_after_s: Some(60),
    }
}

fn too_many(used: u64) -> Exceeded {
    Exceeded { scope: QuotaScope::Tenant, quota: "images".to_owned(), limit: IMAGES_MAX.into(), used: used.into(), retry_after_s: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(tenant: Option<&str>, reference: &str, digit: char) -> NewImage {
        let root = digit.to_string().repeat(64);
        let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
        NewImage {
            tenant: tenant.map(|tenant| TenantId::proven(tenant.into())),
            reference: reference.into(),
            digest: format!("sha256:{root}"),
            root: root.try_into().unwrap(),
            config: serde_json::from_value(config).unwrap(),
            size_bytes: 1,
            created_at: OffsetDateTime::UNIX_EPOCH,
            origin: Origin::Archive,
        }
    }

    fn act() -> Act<'static> {
        Act { actor: None, at: OffsetDateTime::UNIX_EPOCH, data: json!({}) }
    }

    async fn record(store: &Store, image: &NewImage) -> Result<Recorded, StoreError> {
        store.record_image(image, &Quotas::default(), &act()).await
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn image_bytes_are_counted_and_bounded(pool: sqlx::PgPool) {
        let store = Store { pool: pool.clone().into() };
        let quotas: Quotas = serde_json::from_value(json!({"image_bytes": 10})).unwrap();
        let sized = |digit, reference, size_bytes| NewImage { size_bytes, ..image(Some("acme"), reference, digit) };
        let first = store.record_image(&sized('a', "one", 6), &quotas, &act()).await.unwrap();
        assert!(matches!(first, Recorded::Yes { .. }));
        let second = store.record_image(&sized('b', "two", 5), &quotas, &act()).await.unwrap();
        let Recorded::Exceeded(exceeded) = second else { panic!("{second:?}") };
        assert_eq!((exceeded.quota.as_str(), exceeded.limit, exceeded.used), ("image_bytes", json!(10), json!(6)));
        // One that takes the first one's place needs only what it is larger.
        assert!(matches!(store.record_image(&sized('b', "one", 10), &quotas, &act()).await.unwrap(), Recorded::Yes { .. }));
        let bytes = async || sqlx::query_scalar!("select image_bytes from tenants where id = 'acme'").fetch_one(&pool).await.unwrap();
        assert_eq!(bytes().await, 10);
        store.remove_image(Some(&TenantId::proven("acme".into())), "one", &act()).await.unwrap().unwrap();
        assert_eq!(bytes().await, 0);
        let kinds = sqlx::query_scalar!("select kind from events order by id").fetch_all(&pool).await.unwrap();
        assert_eq!(kinds, ["image.imported", "image.imported", "image.removed"]);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_tenant_has_so_many_names_for_images_and_no_more(pool: sqlx::PgPool) {
        let store = Store { pool: pool.clone().into() };
        let (acme, other) = (image(Some("acme"), "first", 'a'), image(Some("other"), "first", 'a'));
        record(&store, &acme).await.unwrap();
        sqlx::query(
            "insert into images (id, tenant, reference, digest, root, config, size_bytes, created_at, pulled_from)
            select gen_random_uuid(), tenant, reference || n, digest, root, config, size_bytes, created_at, pulled_from
            from images, generate_series(2, 1000) as n",
        )
        .execute(&pool)
        .await
        .unwrap();

        let further = record(&store, &NewImage { reference: "further".into(), ..acme.clone() }).await.unwrap();

        let Recorded::Exceeded(exceeded) = further else { panic!("{further:?}") };
        assert_eq!((exceeded.quota.as_str(), exceeded.limit, exceeded.used), ("images", json!(1000), json!(1000)));
        // A name that there is may name another image, and others' names are theirs.
        let moved = image(Some("acme"), "first", 'b');
        assert!(matches!(record(&store, &moved).await.unwrap(), Recorded::Yes { .. }));
        assert!(matches!(record(&store, &other).await.unwrap(), Recorded::Yes { .. }));
        assert!(matches!(record(&store, &image(None, "shared", 'c')).await.unwrap(), Recorded::Yes { .. }));
        let mut roots = store.image_roots(&TenantId::proven("acme".into())).await.unwrap();
        roots.sort_by_key(ToString::to_string);
        assert_eq!(roots, ['a', 'b', 'c'].map(|digit| ImageId::try_from(digit.to_string().repeat(64)).unwrap()));
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn the_room_for_an_image_is_what_the_quota_leaves_and_what_it_replaces(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        let quotas: Quotas = serde_json::from_value(json!({"image_bytes": 10})).unwrap();
        let acme = TenantId::proven("acme".into());
        let room = async |reference| store.image_room(&acme, reference, &quotas).await.unwrap().unwrap();
        assert_eq!(room("one").await.0, 10);
        let image = NewImage { size_bytes: 6, ..image(Some("acme"), "one", 'a') };
        assert!(matches!(store.record_image(&image, &quotas, &act()).await.unwrap(), Recorded::Yes { .. }));
        let (bytes, exceeded) = room("two").await;
        assert_eq!((bytes, exceeded.used), (4, json!(6)));
        assert_eq!(room("one").await.0, 10);
        assert_eq!(store.image_room(&acme, "two", &Quotas::default()).await.unwrap().map(|(bytes, _)| bytes), None);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn what_was_a_sandboxs_files_is_told_as_that(pool: sqlx::PgPool) {
        let store = Store { pool: pool.clone().into() };
        let sandbox = SandboxId(Uuid::from_u128(7));
        record(&store, &NewImage { origin: Origin::Sandbox(sandbox), ..image(Some("acme"), "mine", 'a') }).await.unwrap();
        let told = sqlx::query!("select kind, object, data from events").fetch_one(&pool).await.unwrap();
        assert_eq!((told.kind.as_str(), told.object.as_deref()), ("image.committed", Some("image/mine")));
        assert_eq!(told.data["sandbox"], sandbox.to_string());
    }

    fn at(second: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(second)
    }

    fn pulled(reference: &str, digit: char, second: i64) -> NewImage {
        let origin = Origin::Registry(format!("registry.example/{reference}"));
        NewImage { origin, created_at: at(second), ..image(Some("acme"), reference, digit) }
    }

    fn root(digit: char) -> ImageId {
        digit.to_string().repeat(64).try_into().unwrap()
    }

    fn names(images: &[Image]) -> Vec<&str> {
        images.iter().map(|image| image.reference.as_str()).collect()
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn only_roots_that_were_pulled_by_all_who_name_them_and_are_not_used_are_idle(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        record(&store, &image(Some("acme"), "imported", 'a')).await.unwrap();
        record(&store, &pulled("newer", 'b', 5)).await.unwrap();
        record(&store, &pulled("older", 'c', 3)).await.unwrap();
        record(&store, &pulled("too-new", 'd', 9)).await.unwrap();
        record(&store, &pulled("elsewhere", 'e', 3)).await.unwrap();
        record(&store, &pulled("once", 'f', 3)).await.unwrap();
        record(&store, &pulled("anew", 'f', 9)).await.unwrap();
        record(&store, &pulled("same-as-imported", 'a', 3)).await.unwrap();
        let here: Vec<_> = ['a', 'b', 'c', 'd', 'f'].into_iter().map(root).collect();

        let idle = store.idle_roots(&here, at(9), 10).await.unwrap();

        assert_eq!(idle, [root('c'), root('b')]);
        assert_eq!(store.idle_roots(&here, at(9), 1).await.unwrap(), [root('c')]);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_root_is_given_up_with_all_its_names_or_not_at_all(pool: sqlx::PgPool) {
        let store = Store { pool: pool.clone().into() };
        let acme = TenantId::proven("acme".into());
        let act = Act { data: json!({ "reason": "unused" }), ..act() };
        for (reference, digit, second) in [("one", 'b', 3), ("two", 'b', 5), ("stays", 'c', 3)] {
            record(&store, &pulled(reference, digit, second)).await.unwrap();
        }
        record(&store, &NewImage { tenant: None, ..pulled("for-all", 'b', 4) }).await.unwrap();
        let tagged = NewImage { origin: Origin::Image("stays".to_owned()), ..image(Some("acme"), "tagged", 'c') };
        record(&store, &tagged).await.unwrap();

        // One of them was pulled again since somebody looked.
        let none = store.give_up_root(&root('b'), at(5), &act).await.unwrap();
        let needed = store.give_up_root(&root('c'), at(9), &act).await.unwrap();
        let mut gone = store.give_up_root(&root('b'), at(6), &act).await.unwrap();

        gone.sort_unstable();
        assert_eq!((none.as_slice(), needed.as_slice()), (&[][..], &[][..]));
        assert_eq!(gone, ["for-all", "one", "two"]);
        assert_eq!(names(&store.list_images(&acme).await.unwrap()), ["stays", "tagged"]);
        let bytes = sqlx::query_scalar!("select image_bytes from tenants where id = 'acme'").fetch_one(&pool).await.unwrap();
        assert_eq!(bytes, 2);
        let told = sqlx::query_scalar!("select data from events where kind = 'image.removed'").fetch_all(&pool).await.unwrap();
        assert!(told.len() == 3 && told.iter().all(|data| data["reason"] == "unused" && data["digest"].is_string()), "{told:?}");
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn an_image_that_is_pulled_again_is_as_if_it_were_new(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        let acme = TenantId::proven("acme".into());
        record(&store, &pulled("app", 'b', 3)).await.unwrap();

        let touched = store.touch_image(Some(&acme), "app", &root('b'), at(8)).await.unwrap().unwrap();

        assert_eq!((touched.created_at, touched.pulled_from.as_deref()), (at(8), Some("registry.example/app")));
        assert_eq!(store.idle_roots(&[root('b')], at(8), 1).await.unwrap(), []);
        assert!(store.touch_image(Some(&acme), "app", &root('c'), at(9)).await.unwrap().is_none());
        assert!(store.touch_image(None, "app", &root('b'), at(9)).await.unwrap().is_none());
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn what_lost_its_names_gets_no_other(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        let tagged = NewImage { origin: Origin::Image("first".to_owned()), ..image(Some("acme"), "second", 'a') };
        record(&store, &image(Some("acme"), "first", 'a')).await.unwrap();

        let named = record(&store, &tagged).await.unwrap();
        for name in ["first", "second"] {
            store.remove_image(tagged.tenant.as_ref(), name, &act()).await.unwrap().unwrap();
        }
        let too_late = record(&store, &tagged).await.unwrap();

        assert!(matches!(named, Recorded::Yes { .. }) && matches!(too_late, Recorded::Gone), "{named:?} {too_late:?}");
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn names_that_are_given_at_one_time_wait_for_each_other(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        for (name, digit) in [("first", 'a'), ("second", 'b'), ("third", 'a')] {
            record(&store, &image(None, name, digit)).await.unwrap();
        }
        let tagged = |name, digit| NewImage { origin: Origin::Image("first".to_owned()), ..image(None, name, digit) };
        let (one, other) = (tagged("first", 'b'), tagged("second", 'a'));
        let again = tagged("third", 'a');

        for _ in 0..20 {
            let all = tokio::join!(record(&store, &one), record(&store, &other), record(&store, &again), record(&store, &again));
            for recorded in [all.0, all.1, all.2, all.3] {
                assert!(matches!(recorded, Ok(Recorded::Yes { .. } | Recorded::Gone)), "{recorded:?}");
            }
        }
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn what_a_name_named_before_is_told_once_to_whoever_replaced_it(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        for tenant in [None, Some("acme")] {
            let replaced = async |digit| {
                let recorded = record(&store, &image(tenant, "app", digit)).await.unwrap();
                let Recorded::Yes { replaced, .. } = recorded else { panic!("{recorded:?}") };
                replaced
            };

            assert_eq!((replaced('a').await, replaced('a').await), (None, None));
            let (one, other) = tokio::join!(replaced('b'), replaced('c'));

            // The one replaces the first, and the other the one.
            let mut told = [one, other].map(|root| root.unwrap().to_string());
            told.sort_unstable();
            let now = store.find_image(&TenantId::proven("acme".into()), "app").await.unwrap().unwrap().root;
            let between = if now == root('b') { root('c') } else { root('b') };
            assert_eq!(told, [root('a').to_string(), between.to_string()]);
        }
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_tenants_own_image_comes_before_the_shared_one(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        record(&store, &image(None, "python", 'a')).await.unwrap();
        record(&store, &image(Some("acme"), "python", 'b')).await.unwrap();

        let own = store.find_image(&TenantId::proven("acme".into()), "python").await.unwrap().unwrap();
        let shared = store.find_image(&TenantId::proven("other".into()), "python").await.unwrap().unwrap();
        assert!(own.digest.ends_with('b') && !own.is_shared);
        assert!(shared.digest.ends_with('a') && shared.is_shared);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn another_tenants_image_is_not_found(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        record(&store, &image(Some("acme"), "secret", 'a')).await.unwrap();
        let other = TenantId::proven("other".into());
        assert!(store.find_image(&other, "secret").await.unwrap().is_none());
        assert!(store.list_images(&other).await.unwrap().is_empty());
        assert!(store.remove_image(Some(&other), "secret", &act()).await.unwrap().is_none());
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn a_second_import_moves_the_reference(pool: sqlx::PgPool) {
        let store = Store { pool: pool.into() };
        record(&store, &image(None, "python", 'a')).await.unwrap();
        record(&store, &image(None, "python", 'b')).await.unwrap();
        let images = store.list_images(&TenantId::proven("acme".into())).await.unwrap();
        assert_eq!(images.len(), 1);
        assert!(images[0].digest.ends_with('b'));
        assert!(!store.needs_root(&"a".repeat(64).try_into().unwrap()).await.unwrap());
        assert!(store.needs_root(&"b".repeat(64).try_into().unwrap()).await.unwrap());
    }
}

//! Room for what is much work: so much of a kind at one time on this node, and so much of it for one tenant, who may be as slow as they like: the others have room left.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::Instrument as _;

use crate::sandbox::TenantId;

/// The places for one kind of work.
#[derive(Debug)]
pub(super) struct Places {
    /// What they are for, as several of it are called.
    what: &'static str,
    max: usize,
    of_tenant_max: usize,
    /// Who has one. `None`: an operator, for all.
    taken: Mutex<HashMap<Option<TenantId>, usize>>,
}

/// One of them, until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    tenant: Option<TenantId>,
}

impl Places {
    pub(super) fn new(what: &'static str, max: usize, of_tenant_max: usize) -> Arc<Self> {
        Arc::new(Self { what, max, of_tenant_max, taken: Mutex::default() })
    }

    /// Takes one, or says why there is none.
    pub(super) fn take(self: &Arc<Self>, tenant: Option<&TenantId>) -> Result<Place, String> {
        let Self { what, max, of_tenant_max, .. } = **self;
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= max {
            return Err(format!("{max} {what} are in progress, which is all that this node takes at one time"));
        }
        let tenant = tenant.cloned();
        let own = taken.entry(tenant.clone()).or_default();
        if tenant.is_some() && *own >= of_tenant_max {
            return Err(format!("{of_tenant_max} {what} of this tenant are in progress, which is all that this node takes at one time"));
        }
        *own += 1;
        Ok(Place { places: Arc::clone(self), tenant })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.tenant);
            }
        }
    }
}

impl Place {
    /// Does this to its end, whoever waits for it, and keeps the place as long. Fails where it panics.
    pub(super) async fn hold<T: Send + 'static>(self, work: impl Future<Output = T> + Send + 'static) -> Result<T, tokio::task::JoinError> {
        let held = async move {
            let _place = self;
            work.await
        };
        tokio::spawn(held.in_current_span()).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::oneshot, time::timeout};

    use super::*;

    const PLACES_MAX: usize = 8;
    const PLACES_OF_TENANT_MAX: usize = 4;

    fn places() -> Arc<Places> {
        Places::new("uploads", PLACES_MAX, PLACES_OF_TENANT_MAX)
    }

    fn tenant(name: &str) -> TenantId {
        TenantId::proven(name.to_owned())
    }

    #[test]
    fn no_tenant_takes_what_the_others_need() {
        let places = places();
        let (one, other) = (tenant("one"), tenant("other"));
        let of_one: Vec<_> = (0..PLACES_OF_TENANT_MAX).map(|_| places.take(Some(&one)).unwrap()).collect();

        assert!(places.take(Some(&one)).unwrap_err().contains("of this tenant"));
        let of_other = places.take(Some(&other)).unwrap();

        drop(of_one);
        assert!(places.take(Some(&one)).is_ok());
        drop(of_other);
        assert!(places.taken.lock().unwrap().is_empty(), "nobody is remembered who has none");
    }

    #[test]
    fn the_node_takes_no_more_than_it_has_room_for_whoever_they_are() {
        let places = places();
        let all: Vec<_> = (0..PLACES_MAX).map(|_| places.take(None).unwrap()).collect();

        assert!(places.take(None).unwrap_err().contains("this node"));
        assert!(places.take(Some(&tenant("one"))).is_err());

        drop(all);
        assert!(places.take(None).is_ok());
    }

    #[tokio::test]
    async fn a_place_is_held_as_long_as_the_work_goes_on_whoever_waits_for_it() {
        let places = places();
        let all: Vec<_> = (1..PLACES_MAX).map(|_| places.take(None).unwrap()).collect();
        let (begun, has_begun) = oneshot::channel();
        let (end, may_end) = oneshot::channel::<()>();
        let mut waiting = Box::pin(places.take(None).unwrap().hold(async move {
            begun.send(()).unwrap();
            may_end.await
        }));
        tokio::select! {
            _ = &mut waiting => panic!("it is not over"),
            begun = has_begun => begun.unwrap(),
        }

        drop(waiting);

        assert!(places.take(None).is_err());
        end.send(()).unwrap();
        let free = async {
            while places.take(None).is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), free).await.unwrap();
        drop(all);
    }
}

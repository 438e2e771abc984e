//! Room for what comes in: so many archives at one time on this node, and so many of one tenant's.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tracing::Instrument as _;

use crate::sandbox::TenantId;

/// What this node takes at one time. Each may fill as much disk as an archive may have.
const PLACES_MAX: usize = 8;
/// What it takes of one tenant, who may be as slow as they like: the others have room left.
const PLACES_OF_TENANT_MAX: usize = 4;

/// Who has one. `None`: an operator, for all.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<HashMap<Option<TenantId>, usize>>);

/// One of them, until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    tenant: Option<TenantId>,
}

impl Places {
    /// Takes one, or says why there is none.
    pub(super) fn take(self: &Arc<Self>, tenant: Option<&TenantId>) -> Result<Place, String> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= PLACES_MAX {
            return Err(format!("{PLACES_MAX} uploads are in progress, which is all that this node takes at one time"));
        }
        let tenant = tenant.cloned();
        let own = taken.entry(tenant.clone()).or_default();
        if tenant.is_some() && *own >= PLACES_OF_TENANT_MAX {
            return Err(format!(
                "{PLACES_OF_TENANT_MAX} uploads of this tenant are in progress, which is all that this node takes at one time"
            ));
        }
        *own += 1;
        Ok(Place { places: Arc::clone(self), tenant })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.tenant) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.tenant);
            }
        }
    }
}

impl Place {
    /// Does this to its end, whoever waits for it, and keeps the place as long: what was sent has its disk until then. Fails where it panics.
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

    fn tenant(name: &str) -> TenantId {
        TenantId::proven(name.to_owned())
    }

    #[test]
    fn no_tenant_takes_what_the_others_need() {
        let places = Arc::new(Places::default());
        let (one, other) = (tenant("one"), tenant("other"));
        let of_one: Vec<_> = (0..PLACES_OF_TENANT_MAX).map(|_| places.take(Some(&one)).unwrap()).collect();

        assert!(places.take(Some(&one)).unwrap_err().contains("of this tenant"));
        let of_other = places.take(Some(&other)).unwrap();

        drop(of_one);
        assert!(places.take(Some(&one)).is_ok());
        drop(of_other);
        assert!(places.0.lock().unwrap().is_empty(), "nobody is remembered who has none");
    }

    #[test]
    fn the_node_takes_no_more_than_it_has_room_for_whoever_they_are() {
        let places = Arc::new(Places::default());
        let all: Vec<_> = (0..PLACES_MAX).map(|_| places.take(None).unwrap()).collect();

        assert!(places.take(None).unwrap_err().contains("this node"));
        assert!(places.take(Some(&tenant("one"))).is_err());

        drop(all);
        assert!(places.take(None).is_ok());
    }

    #[tokio::test]
    async fn a_place_is_held_as_long_as_the_work_goes_on_whoever_waits_for_it() {
        let places = Arc::new(Places::default());
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

//! What an operation needs of the node on which something lives, and so who answers it: a function of what its row says.

use std::time::Duration;

use axum::http::Method;

use crate::{
    api::{QUICK_DEADLINE, STOP_DEADLINE},
    sandbox::{State, WAIT_MS},
    store::{Home, NodeId, PeerDoor},
};

/// Longer than the node itself takes that answers: whoever of the two gives a request up, it is that one.
const SLACK: Duration = Duration::from_secs(10);
/// Of what takes as long as it is large.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);

/// What an operation needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Need {
    /// Nothing but the database.
    Anybody,
    /// Its row, which is behind only while it starts.
    Row,
    /// The sandbox itself, while it lives.
    Life,
    /// The same, for an answer that waits for an end.
    End,
    /// What it writes, while it lives; and afterwards the whole of it, where more is kept than is stored.
    Log,
    /// The same of a process in it.
    ExecLog,
    /// Its files, while it lives, and afterwards what is kept of them.
    Files,
    /// Once it has ended, what another life is begun on.
    Start,
    /// Whatever there is of it.
    Everything,
}

/// A node that is to answer, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::api) struct Node {
    pub(super) id: NodeId,
    pub(super) door: PeerDoor,
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whither {
    Here,
    /// Whoever takes it from the queue.
    Soon,
    There {
        node: Node,
        /// Whether this node can answer as well as may be, if that one does not.
        may_stay: bool,
    },
    /// A node that is not heard of any more.
    Away,
}

/// What the operation needs that this route has for this method; `None`: the route names no sandbox.
pub(in crate::api) fn of(method: &Method, route: &str) -> Option<Need> {
    let (rest, is_run) = match route.strip_prefix("/v1/sandboxes/{id}") {
        Some(rest) => (rest, false),
        None => (route.strip_prefix("/v1/runs/{id}")?, true),
    };
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    Some(match rest {
        "" if is_read => Need::Row,
        "" if is_run => Need::Life,
        "" if *method == Method::DELETE => Need::Everything,
        "" | "/kill" | "/pause" | "/resume" | "/stats" | "/watch" => Need::Life,
        "/stop" => Need::End,
        "/start" => Need::Start,
        // Told of all nodes.
        "/wait" => Need::Anybody,
        "/logs" | "/attach" => Need::Log,
        "/execs" if is_read => Need::Anybody,
        "/execs" => Need::End,
        "/execs/{eid}" | "/execs/{eid}/kill" | "/execs/{eid}/resize" => Need::Life,
        "/execs/{eid}/logs" | "/execs/{eid}/attach" => Need::ExecLog,
        "/files/{*path}" | "/archive" | "/diff" | "/top" | "/commit" => Need::Files,
        _ if rest.starts_with("/ports/") => Need::Life,
        _ => return None,
    })
}

impl Need {
    /// Who answers for what lives, or lived, there.
    pub(super) fn whither(self, home: &Home) -> Whither {
        let is_over = home.state.is_final();
        let Some(node) = &home.node else {
            let is_to_come = home.state == State::Queued && matches!(self, Self::Log);
            return if is_to_come { Whither::Soon } else { Whither::Here };
        };
        let is_needed = match self {
            Self::Anybody => false,
            Self::Row => home.state == State::Starting,
            Self::Life | Self::End => !is_over,
            Self::Log => !is_over || home.has_log_file,
            Self::ExecLog => true,
            Self::Files => !is_over || home.is_bound,
            Self::Start => is_over && home.is_bound,
            Self::Everything => !is_over || home.is_bound || home.has_log_file,
        };
        // Of what is over the database tells what there is without its node.
        let may_stay = self == Self::Row || is_over;
        match &node.door {
            Some(door) if is_needed && node.is_alive => {
                // What a node keeps is not told to be lost because it cannot be asked just now.
                let may_stay = may_stay && matches!(self, Self::Row | Self::Everything);
                Whither::There { node: Node { id: node.id, door: door.clone() }, may_stay }
            }
            Some(_) if is_needed && !may_stay => Whither::Away,
            Some(_) | None => Whither::Here,
        }
    }

    /// From the end of a request to the head of its answer.
    pub(super) const fn patience(self) -> Duration {
        match self {
            Self::Anybody | Self::Row | Self::Life | Self::Log | Self::ExecLog | Self::Start | Self::Everything => {
                QUICK_DEADLINE.saturating_add(SLACK)
            }
            Self::End => {
                let waits = QUICK_DEADLINE.saturating_add(Duration::from_millis(WAIT_MS.max));
                let longest = if waits.as_millis() > STOP_DEADLINE.as_millis() { waits } else { STOP_DEADLINE };
                longest.saturating_add(SLACK)
            }
            Self::Files => LONG_PATIENCE,
        }
    }

    /// Whether these parameters ask for what is still to come.
    pub(super) fn is_followed(self, pairs: &[(String, String)]) -> bool {
        self == Self::Log && !pairs.iter().any(|(name, value)| name == "follow" && value == "false")
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::{sandbox::SandboxId, store::HomeNode};

    fn home(state: State) -> Home {
        let door = PeerDoor { address: "https://other.example".into(), key: "key".into() };
        let node = HomeNode { id: NodeId(Uuid::nil()), is_alive: true, door: Some(door) };
        Home { id: SandboxId(Uuid::nil()), state, is_bound: false, has_log_file: false, node: Some(node) }
    }

    fn is_there(whither: &Whither) -> bool {
        matches!(whither, Whither::There { .. })
    }

    const OF_LIFE: [Need; 6] = [Need::Life, Need::End, Need::Log, Need::ExecLog, Need::Files, Need::Everything];

    #[test]
    fn every_operation_on_a_sandbox_or_run_says_what_it_needs() {
        let document = crate::api::openapi();
        let document: yaml_serde::Value = yaml_serde::from_str(document).unwrap();
        let mut undecided = Vec::new();
        for (path, item) in document["paths"].as_mapping().unwrap() {
            let path = path.as_str().unwrap().replace("/files/{path}", "/files/{*path}");
            for method in ["get", "put", "post", "patch", "delete", "head"].into_iter().filter(|method| item.get(*method).is_some()) {
                let need = of(&method.to_uppercase().parse().unwrap(), &path);
                if need.is_none() && path.contains("{id}") && (path.starts_with("/v1/sandboxes") || path.starts_with("/v1/runs")) {
                    undecided.push(format!("{method} {path}"));
                }
            }
        }
        assert!(undecided.is_empty(), "{undecided:?}");
    }

    #[test]
    fn what_lives_is_answered_for_where_it_lives() {
        for state in [State::Starting, State::Running, State::Paused] {
            assert!(OF_LIFE.iter().all(|need| is_there(&need.whither(&home(state)))), "{state:?}");
            assert_eq!(Need::Start.whither(&home(state)), Whither::Here);
        }
        assert!(is_there(&Need::Row.whither(&home(State::Starting))));
        assert_eq!(Need::Row.whither(&home(State::Running)), Whither::Here);
    }

    #[test]
    fn what_is_over_is_answered_for_where_something_of_it_is_left() {
        let all = [OF_LIFE.as_slice(), &[Need::Row, Need::Start]].concat();
        let there = |home: &Home| all.iter().copied().filter(|need| is_there(&need.whither(home))).collect::<Vec<_>>();
        assert_eq!(there(&home(State::Exited)), [Need::ExecLog]);
        let logged = Home { has_log_file: true, ..home(State::Exited) };
        assert_eq!(there(&logged), [Need::Log, Need::ExecLog, Need::Everything]);
        let bound = Home { is_bound: true, ..home(State::Failed) };
        assert_eq!(there(&bound), [Need::ExecLog, Need::Files, Need::Everything, Need::Start]);
    }

    #[test]
    fn of_a_node_that_is_not_heard_of_only_what_lived_there_is_away() {
        let dead = |state| {
            let home = home(state);
            Home { has_log_file: true, is_bound: true, node: home.node.map(|node| HomeNode { is_alive: false, ..node }), ..home }
        };
        assert!(OF_LIFE.iter().all(|need| need.whither(&dead(State::Running)) == Whither::Away));
        assert!(OF_LIFE.iter().all(|need| need.whither(&dead(State::Exited)) == Whither::Here));
        assert_eq!(Need::Row.whither(&dead(State::Starting)), Whither::Here);
    }

    #[test]
    fn a_node_that_others_do_not_reach_is_not_asked() {
        let home = home(State::Running);
        let shut = Home { node: home.node.map(|node| HomeNode { door: None, ..node }), ..home };
        assert!(OF_LIFE.iter().all(|need| need.whither(&shut) == Whither::Here));
    }

    #[test]
    fn what_waits_for_a_node_is_followed_there() {
        let queued = Home { node: None, ..home(State::Queued) };
        assert_eq!(Need::Log.whither(&queued), Whither::Soon);
        assert_eq!(Need::Life.whither(&queued), Whither::Here);
        let follow = |value: &str| Need::Log.is_followed(&[("follow".to_owned(), value.to_owned())]);
        assert!(follow("true") && !follow("false") && Need::Log.is_followed(&[]) && !Need::Life.is_followed(&[]));
    }
}

//! The table against a real database.

use sandbox_core::protocol::Cause;
use serde_json::json;
use sqlx::PgPool;

use super::{super::sandboxes::tests::*, *};
use crate::{
    sandbox::{
        CaseReader, Comparison, Content, DefaultQuotas, Finish, Judging, Kind, Limits, LogTail, Phases, Reason, RequestedLimits, Sandbox,
        TenantId,
    },
    store::{Admission, Admitted, Ended, Lease, LogKept, Promise, Return, Writer},
};

fn run() -> Sandbox {
    let judging = Judging { comparison: Comparison::Exact, stop_at_failure: true };
    Sandbox { judging: Some(judging), ..sandbox("acme", Kind::Run, None) }
}

fn case(name: Option<&str>, stdin: Option<&[u8]>, expected: Option<&[u8]>) -> NewCase {
    let content = |bytes: &[u8]| Content(bytes.to_vec());
    NewCase { name: name.map(Into::into), stdin: stdin.map(content), expected_stdout: expected.map(content) }
}

async fn admit_cases(store: &Store, run: &Sandbox, lease: Lease, cases: &[NewCase]) {
    store.introduce(&owner(run), run.created_at).await.unwrap();
    let admission = Admission {
        sandbox: run,
        lease,
        input: &Input::default(),
        cases,
        asked: &json!({}),
        network: "none",
        isolation: "container",
        defaults: &DefaultQuotas::default(),
        queue_max: 1000,
        wanted_node: None,
        key: None,
        promise: Promise::Now,
    };
    assert!(matches!(store.admit(admission).await.unwrap(), Admitted::Yes { .. }));
}

fn finish(cause: Cause) -> Finish {
    let limits = Limits::of(Kind::Run, RequestedLimits::default()).unwrap();
    Finish::without_usage(cause, OffsetDateTime::UNIX_EPOCH, &limits, Phases::default())
}

fn output() -> CaseOutput {
    CaseOutput { stdout: Beginning { bytes: b"out\xff".to_vec(), omitted_bytes: 7 }, stderr: Beginning::default() }
}

fn end() -> CaseEnd {
    let (end, _) = CaseEnd::of(finish(Cause::Exited { code: 3 }), CaseReader::new(None));
    CaseEnd { started_at: Some(OffsetDateTime::UNIX_EPOCH), stored_bytes: 4, ..end }
}

async fn finish_case(store: &Store, run: &Sandbox, hold: Hold) -> bool {
    store.finish_case(run.id, hold, 0, &end(), &output()).await.unwrap()
}

#[sqlx::test(migrations = "../migrations")]
async fn cases_are_given_what_they_were_admitted_with(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let run = run();
    admit_cases(&store, &run, lease, &[case(Some("empty"), None, None), case(None, Some(b"\0in"), Some(b""))]).await;

    assert_eq!(store.find(&run.tenant, run.id).await.unwrap().unwrap().judging, run.judging);
    let open = |name: Option<&str>| Case { name: name.map(Into::into), end: None };
    assert_eq!(store.cases_of(run.id).await.unwrap(), [open(Some("empty")), open(None)]);
    assert_eq!((store.case_stdin(run.id, 0).await.unwrap(), store.case_expected(run.id, 0).await.unwrap()), (None, None));
    assert_eq!(store.case_stdin(run.id, 1).await.unwrap().as_deref(), Some(b"\0in".as_slice()));
    assert_eq!(store.case_expected(run.id, 1).await.unwrap().as_deref(), Some(b"".as_slice()));
}

#[sqlx::test(migrations = "../migrations")]
async fn the_end_of_a_case_is_stored_by_whoever_holds_its_run_and_by_nobody_else(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let run = run();
    admit_cases(&store, &run, lease, &[case(None, None, None), case(None, None, None)]).await;
    let (hold, of_another) = (Hold { lease, claims: 1 }, Hold { lease, claims: 2 });

    assert!(!finish_case(&store, &run, of_another).await);
    assert_eq!(store.cases_of(run.id).await.unwrap()[0].end, None);
    // The answer to the first may have been lost.
    assert!(finish_case(&store, &run, hold).await);
    assert!(finish_case(&store, &run, hold).await);
    let cases = store.cases_of(run.id).await.unwrap();
    assert_eq!((&cases[0].end, &cases[1].end), (&Some(end()), &None));
}

#[sqlx::test(migrations = "../migrations")]
async fn ends_outlive_a_return_into_the_queue_and_no_failed_attempt(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let run = Sandbox { retries_left: 1, ..run() };
    admit_cases(&store, &run, lease, &[case(None, Some(b"in"), None)]).await;
    let none = Input::default();
    let at = OffsetDateTime::UNIX_EPOCH;
    assert!(finish_case(&store, &run, Hold { lease, claims: 1 }).await);

    assert!(store.give_back(run.id, Hold { lease, claims: 1 }, Return::NotBegun { input: &none, until: None }, at).await.unwrap());
    store.claim(run.id, lease, at).await.unwrap().unwrap();
    assert_eq!(store.cases_of(run.id).await.unwrap()[0].end, Some(end()));

    assert!(store.give_back(run.id, Hold { lease, claims: 2 }, Return::Failed { message: "gone", until: at }, at).await.unwrap());
    assert_eq!(store.cases_of(run.id).await.unwrap()[0].end, None);
    assert_eq!(store.case_stdin(run.id, 0).await.unwrap().as_deref(), Some(b"in".as_slice()));
}

/// As another version of ours may have written it.
#[sqlx::test(migrations = "../migrations")]
async fn an_end_that_cannot_be_read_ends_its_run_and_keeps_its_verdict_and_its_output(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let run = run();
    admit_cases(&store, &run, lease, &[case(None, None, None), case(None, None, None)]).await;

    for (column, value) in [("outcome", json!({ "reason": "of another version" })), ("used", json!([]))] {
        assert!(finish_case(&store, &run, Hold { lease, claims: 1 }).await);
        let damaging = format!("update run_cases set {column} = $1 where verdict is not null");
        sqlx::query(sqlx::AssertSqlSafe(damaging)).bind(Json(&value)).execute(&pool).await.unwrap();
        let cases = store.cases_of(run.id).await.unwrap();
        let end = cases[0].end.as_ref().unwrap();
        let judged = run.judging.unwrap().of(&cases);

        assert_eq!(judged.outcome.unwrap().reason, Reason::InfraError, "{column}");
        assert!(end.outcome.message.contains(" of a case cannot be read: "), "{}", end.outcome.message);
        assert_eq!((end.verdict, end.used, end.stored_bytes), (Verdict::Failed, Usage::default(), 4));
        assert_eq!(store.told_cases(run.id, Beginning::BYTES_MAX).await.unwrap()[0].output, output());
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn what_cases_were_given_goes_at_the_end_of_their_run_and_what_they_wrote_counts(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let run = run();
    admit_cases(&store, &run, lease, &[case(None, Some(b"in"), Some(b"out"))]).await;
    let hold = Hold { lease, claims: 1 };
    assert!(finish_case(&store, &run, hold).await);

    let finish = finish(Cause::Exited { code: 3 });
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 4, log_file: LogKept::No };
    assert!(store.finish(run.id, Writer::Holder(hold), &ended).await.unwrap());

    assert_eq!(store.cases_of(run.id).await.unwrap()[0].end, Some(end()));
    assert_eq!((store.case_stdin(run.id, 0).await.unwrap(), store.case_expected(run.id, 0).await.unwrap()), (None, None));
    let counted = sqlx::query_scalar!("select log_bytes from tenants where id = 'acme'").fetch_one(&pool).await.unwrap();
    assert_eq!(counted, 4);
    assert!(!finish_case(&store, &run, hold).await);
}

#[sqlx::test(migrations = "../migrations")]
async fn old_cases_go_a_few_runs_at_a_time_each_with_all_of_its_own_and_before_their_run(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let hold = Hold { lease, claims: 1 };
    let runs = [run(), run()];
    for run in &runs {
        admit_cases(&store, run, lease, &[case(None, None, None), case(None, None, None), case(None, None, None)]).await;
        assert!(finish_case(&store, run, hold).await);
    }
    // Of its making its id says so, too.
    let later = time::macros::datetime!(2200-01-01 00:00 UTC);
    assert_eq!(store.prune_cases(later, 10).await.unwrap(), 0, "they go on");
    for run in &runs {
        let finish = finish(Cause::Exited { code: 3 });
        let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 4, log_file: LogKept::No };
        assert!(store.finish(run.id, Writer::Holder(hold), &ended).await.unwrap());
    }
    let left = async || {
        let mut left = [store.told_cases(runs[0].id, 10).await.unwrap().len(), store.told_cases(runs[1].id, 10).await.unwrap().len()];
        left.sort_unstable();
        left
    };

    assert_eq!(store.prune_sandboxes(later, 10).await.unwrap(), 0);
    // A limit in the midst of a run is none for that run.
    assert_eq!((store.prune_cases(later, 2).await.unwrap(), left().await), (3, [0, 3]));
    assert_eq!((store.prune_cases(later, 4).await.unwrap(), left().await), (3, [0, 0]));
    assert_eq!(store.prune_sandboxes(later, 10).await.unwrap(), 2);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_case_is_told_by_its_own_place_whatever_has_become_of_others(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let run = run();
    admit_cases(&store, &run, lease, &[case(None, None, None), case(Some("second"), None, None)]).await;
    sqlx::query("delete from run_cases where index = 0").execute(&pool).await.unwrap();

    let told = store.told_cases(run.id, 10).await.unwrap();

    assert_eq!(told.iter().map(|told| (told.index, told.case.name.as_deref())).collect::<Vec<_>>(), [(1, Some("second"))]);
}

#[sqlx::test(migrations = "../migrations")]
async fn of_what_cases_wrote_each_is_told_its_share_in_whole_characters(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let run = run();
    admit_cases(&store, &run, lease, &[case(None, None, None), case(None, None, None)]).await;
    let written = CaseOutput {
        stdout: Beginning { bytes: "grün".into(), omitted_bytes: 7 },
        stderr: Beginning { bytes: vec![b'x'; Beginning::BYTES_MAX], omitted_bytes: 0 },
    };
    assert!(store.finish_case(run.id, Hold { lease, claims: 1 }, 0, &end(), &written).await.unwrap());
    let told = async |stream_bytes| {
        let cases = store.told_cases(run.id, stream_bytes).await.unwrap();
        assert_eq!((cases.len(), &cases[1].case.end, &cases[1].output), (2, &None, &CaseOutput::default()));
        let CaseOutput { stdout, stderr } = &cases[0].output;
        let text = String::from_utf8(stdout.bytes.clone()).unwrap();
        assert_eq!(stderr.bytes.len() as u64 + stderr.omitted_bytes, Beginning::BYTES_MAX as u64);
        format!("{text} {} {}", stdout.omitted_bytes, stderr.bytes.len())
    };

    assert_eq!(
        [told(0).await, told(6).await, told(8).await, told(9).await, told(10).await],
        [" 12 0", "gr 10 3", "grü 8 4", "grü 8 4", "grün 7 5"]
    );
    assert_eq!(store.told_cases(run.id, 2 * Beginning::BYTES_MAX).await.unwrap()[0].output, written);
    assert_eq!(store.told_cases(run.id, usize::MAX).await.unwrap()[0].output, written);
    let stored = store.cases_of(run.id).await.unwrap()[0].end.as_ref().unwrap().stored_bytes;
    assert_eq!(stored, (5 + Beginning::BYTES_MAX) as u64);

    let bytes = async |tenant: &TenantId, cases_bytes| store.told_bytes(tenant, &[run.id], 10, cases_bytes).await.unwrap();
    let (around, most) = (2 * 256, 2 * 2 * Beginning::BYTES_MAX as u64);
    assert_eq!([bytes(&run.tenant, 10).await, bytes(&run.tenant, usize::MAX).await], [20 + around, most + around]);
    assert_eq!(bytes(&TenantId::proven("other".into()), 10).await, 0);
    let finish = finish(Cause::Exited { code: 0 });
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 4, log_file: LogKept::No };
    assert!(store.finish(run.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());
    assert_eq!(bytes(&run.tenant, usize::MAX).await, stored + around);
}

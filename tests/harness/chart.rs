//! What Helm makes of the chart, by its own engine. `tools/setup.sh test` installs that beside what is built.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::service::program;

/// The oldest Kubernetes that the chart is for, and the newest whose schemas are at hand.
const VERSIONS: [&str; 2] = ["1.29", "1.37"];

/// What Helm says of the chart, and what it made of each set of values.
#[derive(Debug, Deserialize)]
pub struct Chart {
    pub metadata: Value,
    /// The values of `values.yaml`.
    pub values: Value,
    pub lint: Value,
    pub answers: Vec<Answer>,
}

/// What it made of one set of values: objects, or an error.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Answer {
    pub error: Option<String>,
    pub objects: Vec<Value>,
    /// Each template's text, by its name.
    pub texts: std::collections::BTreeMap<String, String>,
    /// What Kubernetes' schemas have against the objects.
    pub faults: Vec<String>,
}

impl Answer {
    /// The objects of a kind.
    pub fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    /// The only object of a kind. Panics where there is none, or another one.
    #[must_use]
    pub fn only(&self, kind: &str) -> &Value {
        let all: Vec<_> = self.of_kind(kind).collect();
        assert!(all.len() == 1, "{} objects of the kind {kind}: {:?}", all.len(), self.error);
        all[0]
    }
}

/// Renders the chart with each of these sets of values over its own. Panics if the engine is not there, or breaks.
#[must_use]
pub fn render_all(sets: &[Value]) -> Chart {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cases: Vec<_> = sets.iter().map(|values| json!({ "name": "mayfly", "values": values, "versions": VERSIONS })).collect();
    let asked = json!({ "chart": here.join("../helm/mayfly"), "cases": cases });
    let mut child = Command::new(python())
        .arg(here.join("helm/render.py"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the engine is installed: tools/setup.sh test");
    child.stdin.take().expect("piped").write_all(asked.to_string().as_bytes()).expect("it reads all of it");
    let output = child.wait_with_output().expect("it is our child");
    assert!(output.status.success(), "tests/helm/render.py ended with {}", output.status);
    serde_json::from_slice(&output.stdout).expect("an answer for each case")
}

/// The same of one set.
#[must_use]
pub fn render(values: Value) -> Answer {
    let mut answer = render_all(&[values]).answers.pop().expect("an answer for each case");
    assert!(answer.error.is_none(), "{:?}", answer.error.take());
    answer
}

/// The Python that has the engine.
#[must_use]
pub fn python() -> PathBuf {
    let program = program("mayfly");
    let target = program.parent().and_then(Path::parent).expect("a program lies in a profile's folder");
    target.join("helm/bin/python")
}

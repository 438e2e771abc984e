//! What is done over and over: one run of a program, by one request.

use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::service::{Failure, Service};

/// Something that can be done many times, also at one time.
pub(crate) trait Work: Send + Sync + 'static {
    /// Does it once, to its end. `number` rises from one to the next.
    fn once(&self, number: u64) -> impl Future<Output = Result<Done, Failure>> + Send;

    /// What this one is counted as, beside all together.
    fn label(&self, _number: u64) -> Option<&'static str> {
        None
    }
}

/// What is known of one that went well.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// How long it took, where that is not all that passed.
    pub(crate) took: Option<Duration>,
    /// Whether it was launched warm or cold, and how long that took.
    pub(crate) launch: Option<(String, Duration)>,
    pub(crate) started_at: Option<OffsetDateTime>,
}

/// `POST /v1/runs`, with these requests in turn.
#[derive(Debug, Clone)]
pub(crate) struct Runs {
    service: Service,
    requests: Vec<(Option<&'static str>, Value)>,
    /// Each is asked for with another number of files, so that nothing that stands ready fits it.
    is_cold: bool,
}

/// The default number of files that a sandbox may have; one less is another class of sandboxes.
const INODES: u64 = 4096;

impl Runs {
    pub(crate) fn of(service: &Service, request: Value) -> Self {
        Self { service: service.clone(), requests: vec![(None, request)], is_cold: false }
    }

    /// The same, and never from what was prepared.
    pub(crate) fn cold(service: &Service, request: Value) -> Self {
        Self { is_cold: true, ..Self::of(service, request) }
    }

    /// A program in each of these languages.
    pub(crate) fn in_languages(service: &Service, languages: &[String]) -> Result<Self> {
        let requests = languages.iter().map(|name| language(name)).collect::<Result<_>>()?;
        Ok(Self { service: service.clone(), requests, is_cold: false })
    }

    fn request(&self, number: u64) -> &(Option<&'static str>, Value) {
        let count = u64::try_from(self.requests.len()).unwrap_or(1);
        &self.requests[usize::try_from(number % count).unwrap_or(0)]
    }
}

impl Work for Runs {
    async fn once(&self, number: u64) -> Result<Done, Failure> {
        let request = &self.request(number).1;
        let told = if self.is_cold {
            let mut request = request.clone();
            request["limits"]["inodes"] = (INODES - 1 - number % (INODES / 2)).into();
            self.service.run(&request).await?
        } else {
            self.service.run(request).await?
        };
        let launch = told.outcome.and_then(|outcome| Some((outcome.launch?, Duration::from_secs_f64(outcome.phases_ms.launch / 1e3))));
        Ok(Done { took: None, launch, started_at: told.started_at })
    }

    fn label(&self, number: u64) -> Option<&'static str> {
        self.request(number).0
    }
}

/// A small program that does what people do in that language: it reads its input and prints something of it.
fn language(name: &str) -> Result<(Option<&'static str>, Value)> {
    let (label, source) = match name {
        "python" => ("python", "import sys\nprint(sum(int(word) for word in sys.stdin.read().split()))\n"),
        "c" => ("c", C),
        "bash" => ("bash", "read -ra words\nsum=0\nfor word in \"${words[@]}\"; do ((sum += word)); done\necho $sum\n"),
        "javascript" => (
            "javascript",
            "const words = require('fs').readFileSync(0, 'utf8').trim().split(/\\s+/);\nconsole.log(words.map(Number).reduce((a, b) => a + b));\n",
        ),
        _ => bail!("no program is known for the language {name:?}: there are python, c, bash and javascript"),
    };
    Ok((Some(label), json!({ "language": label, "source": source, "stdin": "1 2 3 4 5 6 7 8 9 10\n" })))
}

const C: &str = "#include <stdio.h>
int main(void) {
    int sum = 0, word;
    while (scanf(\"%d\", &word) == 1) sum += word;
    printf(\"%d\\n\", sum);
    return 0;
}
";

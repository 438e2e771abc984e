//! `loadtest run`: one shape after another against a service, with a report, a picture of each, and targets that are met or not.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum as _};

use crate::{
    plot,
    report::{Report, ShapeReport},
    service::Service,
    shape::{self, Load, Measured, Shape},
    target::Targets,
};

/// Puts load on a service and tells how long callers waited, and what was refused.
///
/// A closed loop sends a request when one before it has ended, as callers do that wait: when the service stalls, few notice, since nobody else comes. An open loop
/// sends each request when its schedule says, decided beforehand, and measures from then: a stall is felt by all who would have come. Failed requests are never
/// among the times; they are counted by code, and one is one too many unless --max-errors says otherwise.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to do; all of it, one after another, if nothing is named
    #[arg(value_enum, value_name = "SHAPE")]
    shapes: Vec<Shape>,
    /// Where the service listens
    #[arg(long, env = "MAYFLY_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// A token with the scopes `runs`, `sandboxes:read` and `sandboxes:write`
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: String,
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    targets: Targets,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Report")]
struct Output {
    /// Folder for report.json, report.txt and a picture of each shape, made if it is missing
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// JSON on stdout, in place of text
    #[arg(long)]
    json: bool,
    /// Words for the head of the report: which machine, which day
    #[arg(long, value_name = "TEXT", default_value = "")]
    about: String,
    /// How long a request may take before it counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    timeout_s: f64,
}

/// Measures, tells, and says whether all targets were met.
pub(crate) async fn run(arguments: &Arguments) -> Result<bool> {
    let Arguments { url, token, load, output, targets, .. } = arguments;
    let service = Service::new(url, token, Duration::from_secs_f64(output.timeout_s))?;
    if let Some(out) = &output.out {
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    }
    let shapes = if arguments.shapes.is_empty() { Shape::value_variants() } else { &arguments.shapes };
    let mut report = Report { about: output.about.clone(), url: url.clone(), shapes: Vec::new(), is_met: true };
    let mut stdout = std::io::stdout();
    for shape in shapes {
        let Measured { kind, tally, facts } = shape::measure(*shape, load, &service).await.with_context(|| shape.name())?;
        let told = ShapeReport::new(shape.name(), kind, &tally, facts, targets)?;
        if let Some(out) = &output.out {
            plot::draw(&out.join(format!("{}.svg", shape.name())), &title(&told, &output.about), &tally)?;
        }
        if !output.json {
            writeln!(stdout, "{}", told.text())?;
        }
        report.is_met &= told.is_met();
        report.shapes.push(told);
    }
    let json = serde_json::to_string_pretty(&report)?;
    if output.json {
        writeln!(stdout, "{json}")?;
    }
    if let Some(out) = &output.out {
        save(out, &report, &json)?;
    }
    Ok(report.is_met)
}

fn title(told: &ShapeReport, about: &str) -> String {
    let what = format!("{}: {} requests, {} failed, {:.0} a second", told.shape, told.sent, told.failed, told.rate_per_s);
    if about.is_empty() { what } else { format!("{what} — {about}") }
}

fn save(out: &Path, report: &Report, json: &str) -> Result<()> {
    let texts: Vec<String> = report.shapes.iter().map(ShapeReport::text).collect();
    fs::write(out.join("report.txt"), format!("{}\n\n{}", report.about, texts.join("\n")))?;
    fs::write(out.join("report.json"), json)?;
    Ok(())
}

//! What was measured as a picture: how long how many waited, and when.

use std::path::Path;

use anyhow::{Context as _, Result};
use plotters::prelude::{
    BLUE, ChartBuilder, DrawingArea, IntoDrawingArea as _, IntoLogRange as _, LineSeries, RED, RGBColor, SVGBackend, SeriesLabelPosition,
    WHITE,
};
use plotters::{
    coord::Shift,
    element::PathElement,
    style::{BLACK, Color as _},
};

use crate::tally::{Tally, at_ms, count};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const WIDTH: u32 = 1200;
const HEIGHT: u32 = 440;
const FONT: &str = "sans-serif";
/// Points of the curve, and slices of time.
const STEPS: u32 = 200;

/// Writes an SVG with both curves. Where nothing went well there is nothing to draw.
pub(crate) fn draw(path: &Path, title: &str, tally: &Tally) -> Result<()> {
    if tally.succeeded() == 0 {
        return Ok(());
    }
    let area = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(title, (FONT, 20))?;
    let (left, right) = area.split_horizontally(WIDTH / 2);
    by_percentile(&left, tally)?;
    over_time(&right, tally)?;
    area.present().with_context(|| path.display().to_string())
}

/// From the fastest to the slowest, drawn out towards the slow ones: each step to the right is a tenth of those that are left.
fn by_percentile(area: &Area<'_>, tally: &Tally) -> Result<()> {
    let nines_max = count(tally.succeeded()).log10().max(1.0);
    let curve = (0..=STEPS).map(|step| {
        let nines = nines_max * f64::from(step) / f64::from(STEPS);
        (nines, at_ms(&tally.latency, 1.0 - 10_f64.powf(-nines)))
    });
    let (low, high) = bounds(tally);
    let mut chart = ChartBuilder::on(area)
        .caption("by percentile", (FONT, 15))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..nines_max, (low..high).log_scale())?;
    let percent = |nines: &f64| format!("{}", ((1.0 - 10_f64.powf(-nines)) * 1e6).round() / 1e4);
    chart.configure_mesh().x_labels(6).x_label_formatter(&percent).x_desc("percent of requests").y_desc("ms").draw()?;
    chart.draw_series(LineSeries::new(curve, BLUE.stroke_width(2)))?;
    Ok(())
}

/// The median and the slowest of each slice of time.
fn over_time(area: &Area<'_>, tally: &Tally) -> Result<()> {
    let lasted = tally.points.iter().map(|(at, _)| *at).fold(0.001, f64::max);
    let (low, high) = bounds(tally);
    let mut chart = ChartBuilder::on(area)
        .caption("by when they ended", (FONT, 15))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..lasted, (low..high).log_scale())?;
    chart.configure_mesh().x_desc("seconds").y_desc("ms").draw()?;
    let slices = slices(&tally.points, lasted);
    let median = slices.iter().map(|(at, took)| (*at, took[took.len() / 2]));
    let slowest = slices.iter().filter_map(|(at, took)| Some((*at, *took.last()?)));
    let key = |color: RGBColor| move |(x, y): (i32, i32)| PathElement::new([(x, y), (x + 16, y)], color);
    chart.draw_series(LineSeries::new(slowest, RED))?.label("slowest").legend(key(RED));
    chart.draw_series(LineSeries::new(median, BLUE))?.label("median").legend(key(BLUE));
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).background_style(WHITE).border_style(BLACK).draw()?;
    Ok(())
}

/// The times of each slice in which something ended, from the fastest to the slowest.
fn slices(points: &[(f64, f64)], lasted: f64) -> Vec<(f64, Vec<f64>)> {
    let mut points = points.to_vec();
    points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let width = lasted / f64::from(STEPS);
    let mut slices = Vec::new();
    for same in points.chunk_by(|(a, _), (b, _)| (a / width).floor().total_cmp(&(b / width).floor()).is_eq()) {
        let mut took: Vec<f64> = same.iter().map(|(_, took)| *took).collect();
        took.sort_by(f64::total_cmp);
        slices.push((same[0].0, took));
    }
    slices
}

/// From below the fastest to above the slowest.
fn bounds(tally: &Tally) -> (f64, f64) {
    (at_ms(&tally.latency, 0.0) * 0.8, at_ms(&tally.latency, 1.0) * 1.25)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_holds_what_ended_in_it_and_an_empty_one_is_left_out() {
        let points = [(0.1, 5.0), (199.5, 1.0), (0.2, 3.0)];

        assert_eq!(slices(&points, 200.0), [(0.1, vec![3.0, 5.0]), (199.5, vec![1.0])]);
    }
}

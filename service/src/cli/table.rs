//! Tables, sizes and ages as people read them.

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Between two columns.
const GAP: &str = "   ";

/// Rows below their names, each column as wide as its widest cell. What would steer a terminal is shown instead of done.
pub(super) fn table<const N: usize>(names: [&str; N], rows: &[[String; N]]) -> String {
    let rows: Vec<[String; N]> =
        std::iter::once(names.map(str::to_owned)).chain(rows.iter().cloned()).map(|row| row.map(|cell| plain(&cell))).collect();
    let widths: [usize; N] = std::array::from_fn(|at| rows.iter().map(|row| width(&row[at])).max().unwrap_or(0));
    let lines = rows.iter().map(|row| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, all)| format!("{cell}{}", " ".repeat(all - width(cell)))).collect();
        cells.join(GAP).trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// Without what a terminal would take for an order.
pub(super) fn plain(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

/// At most so many characters.
pub(super) fn cut(text: &str, characters: usize) -> String {
    if text.chars().count() <= characters {
        return text.to_owned();
    }
    text.chars().take(characters.saturating_sub(1)).chain(['…']).collect()
}

/// A size in the largest unit of which there is one.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut tenths, mut unit) = (bytes.saturating_mul(10) / 1024, 0);
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        (tenths, unit) = (tenths / 1024, unit + 1);
    }
    if tenths < 100 { format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]) } else { format!("{} {}", tenths / 10, UNITS[unit]) }
}

/// How long ago this was, in its largest unit.
pub(super) fn age(at: &str, now: OffsetDateTime) -> String {
    let Ok(at) = OffsetDateTime::parse(at, &Rfc3339) else { return plain(at) };
    let seconds = (now - at).whole_seconds().max(0);
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{number} {unit}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".to_owned(), "größer".to_owned()], ["longer".to_owned(), String::new()]];
        assert_eq!(table(["ID", "NAME"], &rows), "ID       NAME\na        größer\nlonger");
    }

    #[test]
    fn what_steers_a_terminal_is_shown() {
        assert_eq!(plain("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }

    #[test]
    fn sizes_and_ages_have_units() {
        assert_eq!([0, 1023, 1024, 1536, 10 << 20, 3 << 40].map(size), ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "10 MiB", "3.0 TiB"]);
        let now = datetime!(2026-01-02 03:04:05 UTC);
        assert_eq!(age("2026-01-02T03:04:04Z", now), "1 second");
        assert_eq!(age("2026-01-02T01:04:05Z", now), "2 hours");
        assert_eq!(age("2025-12-31T03:04:05Z", now), "2 days");
        assert_eq!(age("2027-01-01T00:00:00Z", now), "0 seconds");
        assert_eq!(cut("abcdef", 4), "abc…");
    }
}

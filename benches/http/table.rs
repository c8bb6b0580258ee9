//! The figures of all rounds, and how they are printed.

use crate::servers::Kind;

/// What a row wants of the daemon.
#[derive(Clone, Copy)]
pub(crate) enum Wanted {
    /// So much of nginx's figure, or more.
    AtLeast(f64),
    /// So many times nginx's figure, or less.
    AtMost(f64),
    /// This figure or less, whatever nginx has.
    Below(f64),
}

pub(crate) struct Row {
    label: &'static str,
    wanted: Wanted,
    peernix: Vec<f64>,
    nginx: Vec<f64>,
}

#[derive(Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    pub(crate) fn add(&mut self, kind: Kind, label: &'static str, wanted: Wanted, value: f64) {
        let at = self.0.iter().position(|row| row.label == label).unwrap_or_else(|| {
            self.0.push(Row { label, wanted, peernix: Vec::new(), nginx: Vec::new() });
            self.0.len() - 1
        });
        let row = &mut self.0[at];
        match kind {
            Kind::Peernix => row.peernix.push(value),
            Kind::Nginx => row.nginx.push(value),
        }
    }

    pub(crate) fn print(&self) {
        println!("\n| | peernix | (min–max) | nginx | (min–max) | ratio | wanted | |");
        println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |");
        for Row { label, wanted, peernix, nginx } in &self.0 {
            // Each round against itself: what else the machine did then slowed both down.
            let ratio = median(peernix.iter().zip(nginx).map(|(peernix, nginx)| peernix / nginx));
            let ours = median(peernix.iter().copied());
            let (text, met) = match *wanted {
                Wanted::AtLeast(least) => (format!("≥ {least:.2}×"), ratio >= least),
                Wanted::AtMost(most) => (format!("≤ {most:.2}×"), ratio <= most),
                Wanted::Below(most) => (format!("≤ {most}"), ours <= most),
            };
            println!(
                "| {label} | {} | {} | {} | {} | {ratio:.2} | {text} | {} |",
                figure(ours),
                spread(peernix),
                figure(median(nginx.iter().copied())),
                spread(nginx),
                if met { "" } else { "missed" }
            );
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(values[even / 2 - 1], values[even / 2]),
        odd => values[odd / 2],
    }
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{}–{}", figure(least), figure(most))
}

/// Three digits that count, or all before the point.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.3}"),
    }
}

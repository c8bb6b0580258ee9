//! The figures of all rounds, and how they are printed.

use crate::figures::{figure, median, spread};
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
    /// It is shown, and that is all.
    Anything,
}

pub(crate) struct Row {
    label: String,
    wanted: Wanted,
    peernix: Vec<f64>,
    nginx: Vec<f64>,
}

#[derive(Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    pub(crate) fn add(&mut self, kind: Kind, label: &str, wanted: Wanted, value: f64) {
        let at = self.0.iter().position(|row| row.label == label).unwrap_or_else(|| {
            self.0.push(Row { label: label.to_owned(), wanted, peernix: Vec::new(), nginx: Vec::new() });
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
                Wanted::Anything => (String::new(), true),
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

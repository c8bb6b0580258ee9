//! What was measured beside what is wanted, as a table.

use crate::figures::{figure, median, spread};

/// What a row wants.
#[derive(Clone, Copy)]
pub(crate) enum Wanted {
    /// This figure or less.
    AtMost(f64),
    /// Less than this figure.
    Below(f64),
    /// Nothing: it stands beside others that do.
    Anything,
}

#[derive(Default)]
pub(crate) struct Table(Vec<(String, Vec<f64>, Wanted)>);

impl Table {
    /// A row. Of several values the median counts.
    pub(crate) fn add(&mut self, label: &str, values: &[f64], wanted: Wanted) {
        self.0.push((label.to_owned(), values.to_vec(), wanted));
    }

    pub(crate) fn print(&self) {
        println!("\n| | measured | (min–max) | wanted | |");
        println!("| --- | ---: | ---: | ---: | --- |");
        for (label, values, wanted) in &self.0 {
            let value = median(values.iter().copied());
            let (text, met) = match *wanted {
                Wanted::AtMost(most) => (format!("≤ {}", figure(most)), value <= most),
                Wanted::Below(bound) => (format!("< {}", figure(bound)), value < bound),
                Wanted::Anything => (String::new(), true),
            };
            let spread = if values.len() > 1 { spread(values) } else { String::new() };
            let verdict = if met { "" } else { "missed" };
            println!("| {label} | {} | {spread} | {text} | {verdict} |", figure(value));
        }
    }
}

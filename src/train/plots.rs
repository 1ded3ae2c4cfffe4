//! Pictures of a run: learning curves and the confusion matrix, as SVG.

use std::fmt::Display;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::log::EpochRow;
use super::metrics::Confusion;
use crate::{Error, Result};

const INK: RGBColor = RGBColor(40, 44, 52);
const FAINT: RGBColor = RGBColor(225, 228, 232);
const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VAL: RGBColor = RGBColor(214, 95, 14);
/// Full colour of the confusion matrix; white is none.
const FULL: (f64, f64, f64) = (8.0, 81.0, 156.0);

/// A line to draw: name, colour, and its points where it has a value.
type Curve = (&'static str, RGBColor, Vec<(f64, f64)>);

/// Draws loss and balanced accuracy over the epochs, training and validation, side by side; a dashed line
/// marks what guessing among `classes` gives.
pub fn learning_curves(path: &Path, rows: &[EpochRow], classes: usize) -> Result<()> {
    let points = |value: &dyn Fn(&EpochRow) -> Option<f64>| -> Vec<(f64, f64)> {
        let point =
            |row: &EpochRow| Some((row.epoch as f64, value(row).filter(|v| v.is_finite())?));
        rows.iter().filter_map(point).collect()
    };
    let loss = [
        ("training", TRAIN, points(&|r| Some(r.train_loss))),
        ("validation", VAL, points(&|r| r.val_loss)),
    ];
    let accuracy = [
        ("training", TRAIN, points(&|r| r.train_balanced_accuracy)),
        ("validation", VAL, points(&|r| r.val_balanced_accuracy)),
    ];
    let highest = loss.iter().flat_map(|c| &c.2).map(|p| p.1).fold(0.0, f64::max);
    let top = if highest > 0.0 { highest * 1.08 } else { 1.0 };
    let last = rows.last().map_or(1.0, |r| r.epoch as f64);
    draw(path, (1000, 420), |area| {
        let halves = area.split_evenly((1, 2));
        panel(&halves[0], "Loss", last, top, None, &loss)?;
        panel(
            &halves[1],
            "Balanced accuracy",
            last,
            1.0,
            Some(1.0 / classes.max(1) as f64),
            &accuracy,
        )
    })
}

/// One chart of [`learning_curves`].
fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    last: f64,
    top: f64,
    chance: Option<f64>,
    curves: &[Curve],
) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20).into_font().color(&INK))
        .margin(14)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..last.max(1.0) * 1.02, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .x_desc("epoch")
        .x_labels(8)
        .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x}") } else { String::new() })
        .y_labels(6)
        .y_label_formatter(&|y| format!("{y:.2}"))
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    if let Some(y) = chance {
        let ends = [(0.0, y), (last.max(1.0) * 1.02, y)];
        chart.draw_series(DashedLineSeries::new(ends, 4, 4, INK.mix(0.5).stroke_width(1)))?;
    }
    for (name, colour, points) in curves.iter().filter(|c| !c.2.is_empty()) {
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(*name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
        // Dots show single epochs while there are few, and the only one of a run of one epoch.
        if points.len() <= 40 {
            chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, colour.filled())))?;
        }
    }
    let corner = if title == "Loss" {
        SeriesLabelPosition::UpperRight
    } else {
        SeriesLabelPosition::LowerRight
    };
    chart
        .configure_series_labels()
        .position(corner)
        .background_style(WHITE.mix(0.85))
        .border_style(FAINT)
        .label_font(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    Ok(())
}

/// Draws the confusion matrix: colour and large number are the share of the true class, the small number counts images.
pub fn confusion_matrix(
    path: &Path,
    title: &str,
    confusion: &Confusion,
    classes: &[String],
) -> Result<()> {
    let n = confusion.classes().max(1) as i32;
    let cell = (420 / n).clamp(44, 120);
    let longest = classes.iter().map(|c| c.chars().count()).max().unwrap_or(0) as i32;
    let (left, top) = (64 + longest.min(24) * 8, 92);
    let size = ((left + n * cell + 40).max(360) as u32, (top + n * cell + 40) as u32);
    draw(path, size, |area| {
        let text = |size: i32, colour: RGBColor, h: HPos| {
            ("sans-serif", size).into_font().color(&colour).pos(Pos::new(h, VPos::Center))
        };
        let middle = left + n * cell / 2;
        area.draw_text(title, &text(19, INK, HPos::Center), (size.0 as i32 / 2, 24))?;
        area.draw_text("predicted", &text(14, INK, HPos::Center), (middle, 52))?;
        let upright = text(14, INK, HPos::Center).transform(FontTransform::Rotate270);
        area.draw_text("true", &upright, (20, top + n * cell / 2))?;
        for (i, name) in classes.iter().enumerate().take(n as usize) {
            let at = i as i32 * cell + cell / 2;
            let room = (cell / 8).max(3) as usize;
            area.draw_text(
                &shorten(name, room),
                &text(13, INK, HPos::Center),
                (left + at, top - 16),
            )?;
            area.draw_text(&shorten(name, 24), &text(13, INK, HPos::Right), (left - 10, top + at))?;
        }
        for row in 0..confusion.classes() {
            for column in 0..confusion.classes() {
                let (x, y) = (left + column as i32 * cell, top + row as i32 * cell);
                let count = confusion.get(row, column);
                let share = count as f64 / confusion.images_of(row).max(1) as f64;
                let square = [(x, y), (x + cell, y + cell)];
                area.draw(&Rectangle::new(square, blend(share).filled()))?;
                area.draw(&Rectangle::new(square, FAINT.stroke_width(1)))?;
                let ink = if share > 0.55 { WHITE } else { INK };
                let (cx, cy) = (x + cell / 2, y + cell / 2);
                let percent = format!("{:.0}%", 100.0 * share);
                area.draw_text(
                    &percent,
                    &text(cell / 5 + 2, ink, HPos::Center),
                    (cx, cy - cell / 9),
                )?;
                area.draw_text(
                    &count.to_string(),
                    &text(cell / 9 + 5, ink, HPos::Center),
                    (cx, cy + cell / 6),
                )?;
            }
        }
        Ok(())
    })
}

type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Draws on a white sheet and saves it; every fault of drawing or writing names the file.
fn draw(
    path: &Path,
    size: (u32, u32),
    paint: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Drawn,
) -> Result<()> {
    let fail = |e: &dyn Display| Error::file(path, format!("cannot draw: {e}"));
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        area.fill(&WHITE).map_err(|e| fail(&e))?;
        paint(&area).map_err(|e| fail(&e))?;
        area.present().map_err(|e| fail(&e))?;
    }
    std::fs::write(path, text).map_err(|e| Error::io(path, e))
}

/// White to full colour.
fn blend(share: f64) -> RGBColor {
    let mix = |full: f64| (255.0 + (full - 255.0) * share).round() as u8;
    RGBColor(mix(FULL.0), mix(FULL.1), mix(FULL.2))
}

fn shorten(name: &str, room: usize) -> String {
    if name.chars().count() <= room {
        return name.to_owned();
    }
    name.chars().take(room - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn svg(draw: impl FnOnce(&Path) -> Result<()>) -> String {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("picture.svg");
        draw(&path).expect("drawn");
        // For a look at it: ATTN2D_KEEP_PLOTS=dir cargo test plots
        if let Some(keep) = std::env::var_os("ATTN2D_KEEP_PLOTS") {
            let name = std::thread::current().name().unwrap_or("plot").replace("::", "_");
            std::fs::copy(&path, Path::new(&keep).join(format!("{name}.svg"))).expect("kept");
        }
        std::fs::read_to_string(&path).expect("read")
    }

    fn rows(epochs: u64) -> Vec<EpochRow> {
        let row = |epoch: u64| {
            let t = epoch as f64 / epochs as f64;
            EpochRow {
                epoch,
                step: epoch * 10,
                train_loss: 0.9 * (-2.0 * t).exp() + 0.05,
                train_balanced_accuracy: Some(0.5 + 0.45 * t),
                val_loss: Some(0.8 * (-1.5 * t).exp() + 0.2),
                val_balanced_accuracy: Some(0.5 + 0.35 * t.sqrt()),
                ..EpochRow::default()
            }
        };
        (1..=epochs).map(row).collect()
    }

    #[test]
    fn curves_of_many_epochs() {
        let text = svg(|path| learning_curves(path, &rows(15), 2));
        assert!(text.contains("Balanced accuracy") && text.contains("validation"), "{text}");
        assert_eq!(text.matches("stroke-width=\"2\"").count(), 4, "four curves");
        assert_eq!(text.matches("<circle").count(), 60, "a dot an epoch on four curves");
    }

    #[test]
    fn curves_of_little_data() {
        svg(|path| learning_curves(path, &rows(1), 3));
        let none = svg(|path| learning_curves(path, &[], 2));
        assert!(!none.contains("<circle"));
        let bad = EpochRow { epoch: 1, train_loss: f64::NAN, ..EpochRow::default() };
        let text = svg(|path| learning_curves(path, &[bad], 2));
        assert!(!text.contains("NaN"));
    }

    #[test]
    fn matrix_of_three_classes() {
        let names: Vec<String> =
            ["nevus", "melanoma", "seborrheic_keratosis"].map(String::from).into();
        let confusion =
            Confusion::from_counts(3, vec![180, 20, 0, 30, 50, 20, 0, 0, 0]).expect("9 counts");
        let text = svg(|path| confusion_matrix(path, "validation", &confusion, &names));
        for expected in ["90%", "180", "30%", "seborrheic_keratosis", "predicted"] {
            assert!(text.contains(expected), "{expected}");
        }
    }

    #[test]
    fn matrix_of_two_classes() {
        let names: Vec<String> = ["benign", "malignant"].map(String::from).into();
        let confusion = Confusion::from_counts(2, vec![40, 3, 10, 31]).expect("4 counts");
        let text =
            svg(|path| confusion_matrix(path, "test: 83.8% balanced accuracy", &confusion, &names));
        assert!(text.contains("93%") && text.contains("76%"), "{text}");
    }

    #[test]
    fn a_missing_directory_is_an_error_with_the_file() {
        let error =
            learning_curves(Path::new("no/such/a.svg"), &rows(2), 2).expect_err("no directory");
        assert!(error.to_string().starts_with("no/such/a.svg: "), "{error}");
    }
}

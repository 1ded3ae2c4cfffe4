//! Resizing with antialias, of a whole picture or a part of it.

use super::Image;

/// A rectangle in a picture, in pixels, not necessarily whole ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) width: f32,
    pub(super) height: f32,
}

/// Weights of source pixels for each pixel of one resized axis.
struct Taps {
    /// For each result: the first source pixel and where its weights lie in `weights`.
    spans: Vec<(usize, std::ops::Range<usize>)>,
    weights: Vec<f32>,
}

/// Triangle (bilinear) weights, as wide as a result pixel where the axis shrinks, so that no source pixel is passed over (antialias).
fn taps(source: usize, start: f32, extent: f32, target: usize) -> Taps {
    let scale = extent / target as f32;
    let radius = scale.max(1.0);
    let mut taps = Taps { spans: Vec::with_capacity(target), weights: Vec::new() };
    for place in 0..target {
        let centre = start + (place as f32 + 0.5) * scale;
        let first = ((centre - radius).floor().max(0.0) as usize).min(source - 1);
        let end = ((centre + radius).ceil() as usize).clamp(first + 1, source);
        let from = taps.weights.len();
        taps.weights.extend(
            (first..end)
                .map(|pixel| (1.0 - ((pixel as f32 + 0.5 - centre) / radius).abs()).max(0.0)),
        );
        let sum: f32 = taps.weights[from..].iter().sum();
        if sum > 0.0 {
            taps.weights[from..].iter_mut().for_each(|weight| *weight /= sum);
        } else {
            taps.weights[from] = 1.0;
        }
        taps.spans.push((first, from..taps.weights.len()));
    }
    taps
}

/// `window` of `image` at `width` x `height`: bilinear with antialias, rows and columns one after the other, rounded to bytes once.
pub(super) fn resize(image: &Image, window: Window, width: usize, height: usize) -> Image {
    let columns = taps(image.width, window.x, window.width, width);
    let rows = taps(image.height, window.y, window.height, height);
    let first_row = rows.spans.first().map_or(0, |(first, _)| *first);
    let end_row = rows.spans.last().map_or(0, |(first, range)| first + range.len());
    let mut narrow = vec![0.0f32; (end_row - first_row) * width * 3];
    for (row, line) in narrow.chunks_exact_mut(width * 3).enumerate() {
        let source = &image.pixels[(first_row + row) * image.width * 3..][..image.width * 3];
        for ((first, range), pixel) in columns.spans.iter().zip(line.chunks_exact_mut(3)) {
            let mut sum = [0.0f32; 3];
            for (weight, from) in
                columns.weights[range.clone()].iter().zip(source[first * 3..].chunks_exact(3))
            {
                for channel in 0..3 {
                    sum[channel] += weight * f32::from(from[channel]);
                }
            }
            pixel.copy_from_slice(&sum);
        }
    }
    let mut pixels = Vec::with_capacity(width * height * 3);
    let mut line = vec![0.0f32; width * 3];
    for (first, range) in &rows.spans {
        line.fill(0.0);
        for (weight, source) in rows.weights[range.clone()]
            .iter()
            .zip(narrow[(first - first_row) * width * 3..].chunks_exact(width * 3))
        {
            for (sum, value) in line.iter_mut().zip(source) {
                *sum += weight * value;
            }
        }
        pixels.extend(line.iter().map(|value| (value + 0.5) as u8));
    }
    Image { width, height, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture whose red is the column, green the row, blue a checkerboard.
    fn ramp(width: usize, height: usize) -> Image {
        let pixels = (0..width * height).flat_map(|place| {
            [
                (place % width) as u8,
                (place / width) as u8,
                255 * ((place % width + place / width) % 2) as u8,
            ]
        });
        Image { width, height, pixels: pixels.collect() }
    }

    fn whole(image: &Image) -> Window {
        Window { x: 0.0, y: 0.0, width: image.width as f32, height: image.height as f32 }
    }

    #[test]
    fn resize_to_the_same_size_changes_nothing() {
        let image = ramp(33, 7);
        assert_eq!(resize(&image, whole(&image), 33, 7), image);
    }

    #[test]
    fn shrinking_averages_and_growing_interpolates() {
        let image = ramp(64, 64);
        let small = resize(&image, whole(&image), 8, 8);
        // An eighth of a ramp: the middle of each run of eight pixels; the checkerboard becomes grey (antialias), not black or white.
        for place in 9..54 {
            let (x, y) = (place % 8, place / 8);
            if (1..7).contains(&x) && (1..7).contains(&y) {
                let pixel = &small.pixels[place * 3..][..3];
                assert!(
                    (f32::from(pixel[0]) - (x as f32 * 8.0 + 3.5)).abs() <= 1.0,
                    "red {pixel:?} at {x}"
                );
                assert!(
                    (f32::from(pixel[1]) - (y as f32 * 8.0 + 3.5)).abs() <= 1.0,
                    "green {pixel:?} at {y}"
                );
                assert!((f32::from(pixel[2]) - 127.5).abs() <= 2.0, "blue {pixel:?}");
            }
        }
        let two = Image { width: 2, height: 1, pixels: vec![0, 0, 0, 100, 100, 100] };
        let grown = resize(&two, whole(&two), 4, 1);
        assert_eq!(
            grown.pixels.chunks(3).map(|pixel| pixel[0]).collect::<Vec<_>>(),
            [0, 25, 75, 100]
        );
    }

    #[test]
    fn every_odd_size_can_be_resized_to_every_other() {
        for (width, height) in [(1, 1), (1, 33), (7, 2), (129, 33)] {
            let image = Image { width, height, pixels: vec![200; width * height * 3] };
            for (to_width, to_height) in [(1, 1), (7, 33), (64, 64)] {
                let resized = resize(&image, whole(&image), to_width, to_height);
                assert_eq!((resized.width, resized.height), (to_width, to_height));
                assert_eq!(
                    resized.pixels,
                    vec![200; to_width * to_height * 3],
                    "a flat picture stays flat"
                );
            }
        }
    }
}

//! TensorBoard event files, scalars only.
//!
//! An event file is a sequence of TFRecords, each `length: u64, masked crc of length: u32, bytes, masked crc of bytes:
//! u32`, little endian (tensorflow/core/lib/io/record_writer.h). The bytes are a protobuf `Event` (event.proto), of which
//! four fields are used: `wall_time` (1, double), `step` (2, varint), `file_version` (3, string) and `summary` (5), a
//! message of `value` (1) messages with `tag` (1, string) and `simple_value` (2, float). That little is written out here.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// The file inside a run directory; TensorBoard looks for `tfevents` in the name.
pub const FILE_NAME: &str = "events.out.tfevents.attn2d";

/// Protobuf wire types, the low three bits of a field's key.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

/// An event file that is being written.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Starts a new file, with the version record that TensorBoard expects first.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|e| Error::io(path, e))?;
        let mut events = Self { path: path.to_path_buf(), file };
        let mut event = event_head(0);
        put_bytes(&mut event, 3, b"brain.Event:2");
        events.write(&event)?;
        Ok(events)
    }

    /// Continues a file after `step`: later records go, and so does a record that a kill left half written. Of several records of
    /// that step (its own, and that of an epoch that ends with it) all but the first go too, unless `ends_epoch`. A file that is
    /// missing is started anew.
    pub fn resume(path: &Path, step: u64, ends_epoch: bool) -> Result<Self> {
        if !path.exists() {
            return Self::create(path);
        }
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let kept = length_up_to(&bytes, step, ends_epoch);
        if kept == 0 {
            return Self::create(path);
        }
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io(path, e))?;
        file.set_len(kept as u64).map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Writes the values of one step, each with its tag (`train/loss`); a slash groups charts.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            put_bytes(&mut entry, 1, tag.as_bytes());
            put_key(&mut entry, 2, FIXED32);
            entry.extend_from_slice(&(*value as f32).to_le_bytes());
            put_bytes(&mut summary, 1, &entry);
        }
        let mut event = event_head(step);
        put_bytes(&mut event, 5, &summary);
        self.write(&event)
    }

    /// Waits until everything written is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io(&self.path, e))
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(event);
        record.extend_from_slice(&masked_crc(event).to_le_bytes());
        // One call a record, so that a kill cannot leave half of it.
        self.file.write_all(&record).map_err(|e| Error::io(&self.path, e))
    }
}

/// TFRecord's mask, there so that a crc over bytes that contain crcs stays useful.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn event_head(step: u64) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    let mut event = Vec::new();
    put_key(&mut event, 1, FIXED64);
    event.extend_from_slice(&now.to_le_bytes());
    put_key(&mut event, 2, VARINT);
    put_varint(&mut event, step);
    event
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    put_varint(out, field << 3 | wire_type);
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_key(out, field, BYTES);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Bytes up to the first record that is later than `step`, damaged or cut off, or, unless `ends_epoch`, a second one of it.
fn length_up_to(bytes: &[u8], step: u64, ends_epoch: bool) -> usize {
    let (mut at, mut before) = (0, None);
    while let Some(end) = record_end(bytes, at) {
        let Some(s) = step_of(&bytes[at + 12..end - 4]).filter(|s| *s <= step) else { break };
        if !ends_epoch && s == step && before == Some(s) {
            break;
        }
        (at, before) = (end, Some(s));
    }
    at
}

/// The end of the record that starts at `at`, if it is whole and its crcs are right.
fn record_end(bytes: &[u8], at: usize) -> Option<usize> {
    let length = bytes.get(at..at + 8)?;
    let crc = |from: usize| Some(u32::from_le_bytes(bytes.get(from..from + 4)?.try_into().ok()?));
    if crc(at + 8)? != masked_crc(length) {
        return None;
    }
    let data = at + 12;
    let end = data.checked_add(u64::from_le_bytes(length.try_into().ok()?) as usize)?;
    (crc(end)? == masked_crc(bytes.get(data..end)?)).then_some(end + 4)
}

/// The step of an event as this file writes them: the time first, then the step.
fn step_of(event: &[u8]) -> Option<u64> {
    let rest = event.get(9..)?;
    if *rest.first()? != (2 << 3 | VARINT) as u8 {
        return None;
    }
    let mut step = 0;
    for (i, byte) in rest.get(1..)?.iter().enumerate().take(10) {
        step |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader written from the format's description alone; shares no line with the writer, not even its crc.
    mod reader {
        fn crc32c(bytes: &[u8]) -> u32 {
            let mut crc = !0_u32;
            for &byte in bytes {
                crc ^= u32::from(byte);
                for _ in 0..8 {
                    crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
                }
            }
            !crc
        }

        fn unmask(masked: u32) -> u32 {
            let rotated = masked.wrapping_sub(0xa282_ead8);
            rotated.rotate_left(15)
        }

        pub(super) fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
            let mut out = Vec::new();
            while !bytes.is_empty() {
                let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                let crc = |b: &[u8]| unmask(u32::from_le_bytes(b.try_into().unwrap()));
                assert_eq!(crc(&bytes[8..12]), crc32c(&bytes[..8]), "crc of a length");
                assert_eq!(crc(&bytes[12 + n..16 + n]), crc32c(&bytes[12..12 + n]), "crc of data");
                out.push(bytes[12..12 + n].to_vec());
                bytes = &bytes[16 + n..];
            }
            out
        }

        /// The fields of a message: number and content (a varint as its eight bytes).
        pub(super) fn fields(bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
            let mut at = 0;
            let varint = |at: &mut usize| {
                let (mut value, mut shift) = (0_u64, 0);
                loop {
                    let byte = bytes[*at];
                    *at += 1;
                    value |= u64::from(byte & 127) << shift;
                    shift += 7;
                    if byte < 128 {
                        return value;
                    }
                }
            };
            let mut out = Vec::new();
            while at < bytes.len() {
                let key = varint(&mut at);
                let content = match key & 7 {
                    0 => varint(&mut at).to_le_bytes().to_vec(),
                    kind => {
                        let n = match kind {
                            1 => 8,
                            2 => varint(&mut at) as usize,
                            5 => 4,
                            other => panic!("wire type {other}"),
                        };
                        at += n;
                        bytes[at - n..at].to_vec()
                    }
                };
                out.push((key >> 3, content));
            }
            out
        }
    }

    /// (step, tag, value) of every scalar in a file.
    fn scalars(path: &Path) -> Vec<(u64, String, f32)> {
        let mut out = Vec::new();
        for record in reader::records(&std::fs::read(path).expect("the file")) {
            let event = reader::fields(&record);
            let find = |number: u64| event.iter().find(|f| f.0 == number).map(|f| f.1.clone());
            let step = find(2).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()));
            let time = f64::from_le_bytes(find(1).expect("wall time").try_into().unwrap());
            assert!(time > 1.6e9, "wall time in seconds: {time}");
            for (_, value) in find(5).map(|s| reader::fields(&s)).unwrap_or_default() {
                let value = reader::fields(&value);
                let tag = String::from_utf8(value[0].1.clone()).expect("a tag");
                out.push((step, tag, f32::from_le_bytes(value[1].1.clone().try_into().unwrap())));
            }
        }
        out
    }

    #[test]
    fn an_independent_reader_reads_them() {
        assert_eq!(masked_crc(b""), 0xa282_ead8);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(FILE_NAME);
        let mut events = Events::create(&path).expect("a new file");
        events.scalars(1, &[("train/loss", 0.5), ("train/lr", 1e-3)]).expect("written");
        events.scalars(300, &[("val/balanced_accuracy", 0.75)]).expect("written");
        let first = &reader::records(&std::fs::read(&path).expect("the file"))[0];
        assert!(reader::fields(first).contains(&(3, b"brain.Event:2".to_vec())));
        let expected = [
            (1, "train/loss".to_owned(), 0.5),
            (1, "train/lr".to_owned(), 1e-3),
            (300, "val/balanced_accuracy".to_owned(), 0.75),
        ];
        assert_eq!(scalars(&path), expected);
    }

    #[test]
    fn resuming_cuts_later_and_torn_records() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(FILE_NAME);
        let mut events = Events::create(&path).expect("a new file");
        for step in [1, 127, 128, 200, 300] {
            events.scalars(step, &[("a", step as f64)]).expect("written");
        }
        let bytes = std::fs::read(&path).expect("the file");
        std::fs::write(&path, &bytes[..bytes.len() - 3]).expect("a torn end");
        let mut events = Events::resume(&path, 200, true).expect("continued");
        events.scalars(201, &[("b", 1.0)]).expect("written");
        let steps: Vec<u64> = scalars(&path).iter().map(|s| s.0).collect();
        assert_eq!(steps, [1, 127, 128, 200, 201]);
        // The epoch's record goes, that of the step that ended it stays.
        let mut events = Events::resume(&path, 201, true).expect("continued");
        events.scalars(201, &[("epoch/x", 1.0)]).expect("written");
        for (ends_epoch, last) in [(true, "epoch/x"), (false, "b"), (false, "b")] {
            Events::resume(&path, 201, ends_epoch).expect("continued");
            assert_eq!(scalars(&path).last().map(|s| &*s.1), Some(last));
        }
        Events::resume(&path, 0, true).expect("back to the start");
        assert_eq!(scalars(&path), []);
        std::fs::write(&path, b"junk").expect("a damaged file");
        Events::resume(&path, 5, true)
            .expect("started anew")
            .scalars(6, &[("c", 2.0)])
            .expect("written");
        assert_eq!(scalars(&path), [(6, "c".to_owned(), 2.0)]);
    }
}

//! What a report says of where and when it was made.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The time in UTC, as in `2026-01-31 23:59:59 UTC`.
pub(crate) fn now() -> String {
    utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// The program's words, itself by its name alone.
pub(crate) fn command() -> Vec<String> {
    let mut words: Vec<String> = std::env::args().collect();
    let name = words.first().and_then(|w| Path::new(w).file_name()?.to_str().map(String::from));
    if let (Some(first), Some(name)) = (words.first_mut(), name) {
        *first = name;
    }
    words
}

/// What the machine is called in its network, where the system tells.
pub(crate) fn name() -> String {
    let file = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let variable = || ["HOSTNAME", "COMPUTERNAME"].iter().find_map(|v| std::env::var(v).ok());
    file.or_else(variable).map_or_else(|| "unknown".into(), |name| name.trim().to_owned())
}

/// Processor and cores that this program may use, where the system tells.
pub(crate) fn host() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("", |(_, name)| name.trim());
    match (std::thread::available_parallelism(), model) {
        (Ok(n), "") => format!("{n} cores"),
        (Ok(n), model) => format!("{model}, {n} cores"),
        (Err(_), model) => model.into(),
    }
}

/// `2026-01-31 23:59:59 UTC` of seconds since 1970: days to a date by counting 400-year cycles from a 1 March.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + 400 * era + next;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_000_000_000), "2001-09-09 01:46:40 UTC");
        assert_eq!(utc(4_107_542_399), "2100-02-28 23:59:59 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00:00 UTC");
    }
}

//! Paths that a user gives, looked at before any work: errors name the option, the path, what is expected there and what to do.

use crate::error::{Error, Result};
use std::path::Path;

/// Refuses a path that no file can be read from. `expected` says what the file should be, as in "a TOML file".
///
/// # Errors
/// [`Error::Usage`] where there is nothing at the path, or a folder.
pub fn check_input(option: &str, path: &Path, expected: &str) -> Result<()> {
    let wrong = match path {
        _ if path.is_dir() => "is a folder",
        _ if !path.exists() => "there is no such file",
        _ => return Ok(()),
    };
    let path = path.display();
    Err(Error::usage(format!("{option} {path}: {wrong}; expected {expected}")))
}

/// Refuses a path that no file can be written to.
///
/// # Errors
/// [`Error::Usage`] for a folder, and for a file in a folder that does not exist.
pub fn check_output(option: &str, path: &Path) -> Result<()> {
    let shown = path.display();
    if path.is_dir() {
        let message = format!("{option} {shown}: is a folder; name a file in it");
        return Err(Error::usage(message));
    }
    match path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        Some(folder) => {
            let folder = folder.display();
            let message = format!("{option} {shown}: there is no folder {folder}; make it first");
            Err(Error::usage(message))
        }
        None => Ok(()),
    }
}

/// Refuses a path that no folder can be made at. One that exists will do.
///
/// # Errors
/// [`Error::Usage`] where the path, or one that it goes through, is a file.
pub fn check_output_folder(option: &str, path: &Path) -> Result<()> {
    let Some(nearest) = path.ancestors().find(|p| p.exists()).filter(|p| !p.is_dir()) else {
        return Ok(());
    };
    let (path, nearest) = (path.display(), nearest.display());
    let message = format!(
        "{option} {path}: {nearest} is a file; expected a folder, or a path where one can be made"
    );
    Err(Error::usage(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_wrong_with_a_path_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let (file, none) = (dir.path().join("a"), dir.path().join("none"));
        fs::write(&file, "").unwrap();
        check_input("--x", &file, "a file").unwrap();
        check_output("--x", &file).unwrap();
        check_output("--x", &none).unwrap();
        check_output("--x", Path::new("b")).unwrap();
        check_output_folder("--x", dir.path()).unwrap();
        check_output_folder("--x", &none.join("b/c")).unwrap();
        check_output_folder("--x", Path::new("none/b")).unwrap();
        for (result, expected) in [
            (check_input("--x", &none, "a cat"), "none: there is no such file; expected a cat"),
            (check_input("--x", dir.path(), "a cat"), ": is a folder; expected a cat"),
            (check_output("--x", dir.path()), "is a folder; name a file in it"),
            (check_output("--x", &none.join("b")), "there is no folder"),
            (check_output_folder("--x", &file), "a is a file; expected a folder"),
            (check_output_folder("--x", &file.join("b/c")), "a is a file; expected a folder"),
        ] {
            let error = result.unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("--x ") && text.contains(expected), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}

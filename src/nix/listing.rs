//! `<hash>.ls`: what lies in a NAR and where, as JSON, so that a client can look into a path without fetching it.
//!
//! Written in one pass without recursion: a tree may be as deep as a path is long.

use super::layout::{Cursor, NarLayout, Step};

/// Writes the listing of a NAR, version 1, with the keys in Nix's order. `None`: a name or target in it is not UTF-8,
/// which JSON can't say.
#[must_use]
pub fn listing_json(layout: &NarLayout) -> Option<Vec<u8>> {
    let (mut cursor, mut literal, mut offset) = (Cursor::default(), Vec::new(), 0u64);
    let mut out = br#"{"version":1,"root":"#.to_vec();
    // Whether the innermost open directory has an entry already.
    let mut has_entries = false;
    loop {
        literal.clear();
        let step = cursor.advance(layout, &mut literal);
        offset += literal.len() as u64;
        match step {
            Step::Enter(name) => {
                begin_entry(&mut out, name, has_entries)?;
                out.extend_from_slice(br#"{"type":"directory","entries":{"#);
                has_entries = false;
                continue;
            }
            Step::Leave => out.extend_from_slice(b"}}"),
            Step::File { name, meta } => {
                begin_entry(&mut out, name, has_entries)?;
                let executable = if meta.executable { r#","executable":true"# } else { "" };
                let (size, at) = (meta.size, offset);
                let text = format!(r#"{{"type":"regular","size":{size}{executable},"narOffset":{at}}}"#);
                out.extend_from_slice(text.as_bytes());
                offset += meta.size;
            }
            Step::Symlink { name, target } => {
                begin_entry(&mut out, name, has_entries)?;
                out.extend_from_slice(br#"{"type":"symlink","target":"#);
                put_string(&mut out, target)?;
                out.push(b'}');
            }
            Step::Finished => {
                out.push(b'}');
                return Some(out);
            }
        }
        has_entries = true;
    }
}

fn begin_entry(out: &mut Vec<u8>, name: &[u8], has_entries: bool) -> Option<()> {
    if name.is_empty() {
        return Some(());
    }
    if has_entries {
        out.push(b',');
    }
    put_string(out, name)?;
    out.push(b':');
    Some(())
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    serde_json::to_writer(out, std::str::from_utf8(text).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::layout::{FileMeta, LayoutBuilder};

    fn file(size: u64, executable: bool) -> FileMeta {
        FileMeta { size, executable, modified_ns: 0 }
    }

    #[test]
    fn a_listing_is_what_nix_writes() {
        let mut builder = LayoutBuilder::default();
        builder.directory(b"").unwrap();
        builder.file(b"a", file(3, true)).unwrap();
        builder.symlink(b"b", b"a").unwrap();
        builder.directory(b"sub").unwrap();
        builder.file(b"c", file(3, false)).unwrap();
        builder.end().unwrap();
        builder.end().unwrap();
        let json = listing_json(&builder.finish().unwrap()).unwrap();
        // From `nix copy --to file://…?write-nar-listing=1` of the same tree.
        let nix = r#"{"version":1,"root":{"type":"directory","entries":{"a":{"type":"regular","size":3,"executable":true,"narOffset":264},"b":{"type":"symlink","target":"a"},"sub":{"type":"directory","entries":{"c":{"type":"regular","size":3,"narOffset":784}}}}}}"#;
        assert_eq!(String::from_utf8(json).unwrap(), nix);
    }

    #[test]
    fn names_are_escaped_and_those_that_json_cannot_say_have_no_listing() {
        let mut builder = LayoutBuilder::default();
        builder.directory(b"").unwrap();
        builder.symlink(b"a\"\n", b"x").unwrap();
        builder.directory(b"empty").unwrap();
        builder.end().unwrap();
        builder.file(b"last", file(0, false)).unwrap();
        builder.end().unwrap();
        let json = listing_json(&builder.finish().unwrap()).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(value["root"]["entries"]["a\"\n"]["target"], "x");
        assert_eq!(value["root"]["entries"]["last"]["size"], 0);

        let mut builder = LayoutBuilder::default();
        builder.symlink(b"", &[0xff]).unwrap();
        assert!(listing_json(&builder.finish().unwrap()).is_none());
    }

    #[test]
    fn a_tree_of_ten_thousand_levels_does_not_overflow_the_stack() {
        let mut builder = LayoutBuilder::default();
        builder.directory(b"").unwrap();
        for _ in 0..10_000 {
            builder.directory(b"d").unwrap();
        }
        for _ in 0..=10_000 {
            builder.end().unwrap();
        }
        assert!(listing_json(&builder.finish().unwrap()).is_some());
    }
}

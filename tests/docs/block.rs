//! What stands between fences in a document, and whether a program printed what is shown of it.

/// A fenced block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    /// Of its first fence in the document, from 1 on.
    pub(crate) line: usize,
    pub(crate) language: String,
    pub(crate) text: String,
    /// What a block `text` right behind it shows as its output.
    pub(crate) output: Option<String>,
}

/// Those that are run.
pub(crate) const EXAMPLES: [&str; 3] = ["sh", "python", "ts"];

/// All of a document, but for outputs that belong to one.
pub(crate) fn blocks(document: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = document.lines().enumerate();
    // Nothing but empty lines since the last one.
    let mut is_adjacent = false;
    while let Some((at, line)) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            is_adjacent &= line.is_empty();
            continue;
        };
        let text: String = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").map(|line| format!("{line}\n")).collect();
        match blocks.last_mut() {
            Some(example) if is_adjacent && language == "text" && EXAMPLES.contains(&example.language.as_str()) => {
                example.output = Some(text)
            }
            _ => blocks.push(Block { line: at + 1, language: language.to_owned(), text, output: None }),
        }
        is_adjacent = true;
    }
    blocks
}

/// Whether this was said, where `…` stands for anything. Ends of lines at the end do not count.
pub(crate) fn is_shown(shown: &str, said: &str) -> bool {
    let (shown, mut rest) = (shown.trim_end(), said.trim_end());
    let Some((first, others)) = shown.split_once('…') else { return shown == rest };
    let Some(behind) = rest.strip_prefix(first) else { return false };
    rest = behind;
    let mut parts: Vec<&str> = others.split('…').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some((_, behind)) = rest.split_once(part) else { return false };
        rest = behind;
    }
    rest.ends_with(last)
}

#[test]
fn an_example_has_the_output_that_stands_right_behind_it() {
    let document = "words\n```sh\na\nb\n```\n```text\nout\n```\nmore\n\n```ts\nc\n```\n\nwords\n\n```text\nnobody's\n```\n";

    let found: Vec<_> = blocks(document).into_iter().map(|block| (block.line, block.language, block.text, block.output)).collect();

    assert_eq!(
        found,
        [
            (2, "sh".to_owned(), "a\nb\n".to_owned(), Some("out\n".to_owned())),
            (11, "ts".to_owned(), "c\n".to_owned(), None),
            (17, "text".to_owned(), "nobody's\n".to_owned(), None),
        ]
    );
}

#[test]
fn what_is_shown_is_what_was_said_but_for_gaps() {
    assert!(is_shown("a\nb\n", "a\nb"));
    assert!(!is_shown("a", "a b") && !is_shown("a b", "a"));
    assert!(is_shown("a…c", "a b\nc\n") && is_shown("…", "") && is_shown("a…", "a"));
    assert!(!is_shown("a…c", "a b") && !is_shown("a…b…c", "a c") && !is_shown("ab…b", "ab"));
}

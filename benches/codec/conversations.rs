//! The conversations of `../shared/traces`, as text.

use std::io::Read;
use std::path::Path;

use serde_json::Value;

/// The last state of one conversation.
pub struct Conversation {
    /// Its trace and its number there.
    pub name: String,
    pub text: String,
}

const TRACES: [&str; 3] = [
    "agent-text-miniswe",
    "agent-text-magagent",
    "tau-airline-gpt4o",
];

/// All of them, one of each trace in turn; the demo's text where there are no traces.
pub fn conversations() -> Vec<Conversation> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces");
    let read = |name: &&str| {
        let file = std::fs::File::open(folder.join(format!("{name}.jsonl.gz"))).ok()?;
        let mut text = String::new();
        flate2::read::MultiGzDecoder::new(file)
            .read_to_string(&mut text)
            .expect("the trace is gzip of text");
        Some(of_trace(name, &text).into_iter())
    };
    let mut traces: Vec<_> = TRACES.iter().filter_map(read).collect();
    if traces.is_empty() {
        println!("the traces are not there: the demo's text instead");
        return vec![Conversation {
            name: "demo".into(),
            text: stemkv_serve::demo::handbook(),
        }];
    }
    let longest = traces.iter().map(ExactSizeIterator::len).max();
    let rounds = 0..longest.unwrap_or(0);
    rounds
        .flat_map(|_| {
            traces
                .iter_mut()
                .filter_map(Iterator::next)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// A trace has a line for each conversation, or one for each request, whose input is all that was said
/// before it: then the longest one counts.
fn of_trace(name: &str, trace: &str) -> Vec<Conversation> {
    let mut sessions: Vec<(Value, String)> = Vec::new();
    for line in trace.lines() {
        let line: Value = serde_json::from_str(line).expect("a line of JSON");
        let part = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
        let text = match line["messages"].as_array() {
            Some(messages) => messages
                .iter()
                .map(|message| format!("{}: {}\n", part(message, "role"), part(message, "content")))
                .collect(),
            None => part(&line, "input") + &part(&line, "output"),
        };
        let session = &line["session_id"];
        match sessions.iter_mut().find(|(known, _)| known == session) {
            Some((_, longest)) if longest.len() < text.len() => *longest = text,
            Some(_) => {}
            None => sessions.push((session.clone(), text)),
        }
    }
    let texts = sessions.into_iter().map(|(_, text)| text);
    (1..)
        .zip(texts)
        .map(|(number, text)| Conversation {
            name: format!("{name} {number}"),
            text,
        })
        .collect()
}

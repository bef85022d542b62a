//! Conditions in CEL, the Common Expression Language.
//!
//! What an expression costs is bounded when it is read: it has no loops, is not nested deeply, and every function in it looks at each
//! byte once. What it may name is known, so that a slip of the pen is found then, too. Whatever is not true or false in the end has
//! failed, and it is for the policy to say what that means.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};

use cel::common::ast::{EntryExpr, Expr, operators};
use cel::common::types::{CelInt, CelString};
use cel::common::value::CowVal;
use cel::context::VariableResolver;
use cel::objects::{Key, Map};
use cel::{Context, Env, IdedExpr, Program, Value};
use http::HeaderMap;
use serde_json::Value as Json;

use super::facts::{Facts, host_and_port};
use crate::model::Name;

/// The longest expression, in bytes.
const LONGEST: usize = 4096;

/// So many operators, dots and brackets may be in its text. The parser's stack grows with them before it can be seen what is nested.
const MOST_MARKS: usize = 512;

/// The deepest that brackets may be within each other.
const DEEPEST_BRACKETS: usize = 16;

/// The deepest that what is evaluated may be within each other.
const DEEPEST: usize = 48;

/// Each sum of texts copies what is in it.
const MOST_SUMS: usize = 8;

/// What expressions may name, and of that which fields. Claims have whatever the token has.
const NAMES: [(&str, &[&str]); 4] = [
    ("request", &["method", "path", "host", "headers"]),
    ("source", &["identity", "namespace", "serviceAccount", "trustDomain", "address"]),
    ("destination", &["port"]),
    ("claims", &[]),
];

/// What they may call beside operators.
const FUNCTIONS: [&str; 6] = ["contains", "endsWith", "int", "size", "startsWith", "string"];

const OPERATORS: [&str; 14] = [
    operators::CONDITIONAL,
    operators::LOGICAL_AND,
    operators::LOGICAL_OR,
    operators::LOGICAL_NOT,
    operators::EQUALS,
    operators::NOT_EQUALS,
    operators::GREATER_EQUALS,
    operators::LESS_EQUALS,
    operators::GREATER,
    operators::LESS,
    operators::NEGATE,
    operators::INDEX,
    operators::IN,
    operators::ADD,
];

static ENVIRONMENT: LazyLock<Arc<Env>> =
    LazyLock::new(|| Arc::new(Env::stdlib().with_optional_support(false)));

/// An expression, read and checked.
#[derive(Clone)]
pub struct Expression {
    text: Name,
    program: Arc<Program>,
}

impl Expression {
    /// Reads an expression.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence that follows on its name.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > LONGEST {
            return Err(format!("is longer than {LONGEST} bytes"));
        }
        check_marks(text)?;
        let program = ENVIRONMENT.compile(text).map_err(|errors| match errors.errors.first() {
            Some(error) => {
                let (line, column) = error.pos;
                format!("is no CEL at line {line}, column {column}: {}", error.msg)
            }
            None => "is no CEL".to_owned(),
        })?;
        check(program.expression())?;
        Ok(Self { text: text.into(), program: Arc::new(program) })
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What it says of a request. None where it has failed: it asks for what is not there, or is neither true nor false.
    pub(super) fn evaluate(&self, facts: &Facts<'_>) -> Option<bool> {
        let names = Names(*facts);
        let mut context = Context::with_env(ENVIRONMENT.clone());
        context.set_variable_resolver(&names);
        match self.program.execute(&context) {
            Ok(Value::Bool(is)) => Some(is),
            _ => None,
        }
    }
}

/// Two are equal if their texts are.
impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

/// Counts what could be nested, in texts as well: to know where these end is the parser's.
fn check_marks(text: &str) -> Result<(), String> {
    let (mut depth, mut marks) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' | b'?' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        marks += usize::from(b"([{?.+-*/%<>=!&|,".contains(&byte));
        if depth > DEEPEST_BRACKETS {
            return Err(format!("has brackets or choices more than {DEEPEST_BRACKETS} deep"));
        }
    }
    if marks > MOST_MARKS {
        return Err(format!("has more than {MOST_MARKS} operators, dots, commas and brackets"));
    }
    Ok(())
}

/// Refuses what could take long, and what is not known.
fn check(expression: &IdedExpr) -> Result<(), String> {
    let mut sums = 0;
    let mut left = vec![(expression, 1)];
    while let Some((node, depth)) = left.pop() {
        if depth > DEEPEST {
            return Err(format!("is nested more than {DEEPEST} deep"));
        }
        let mut within = |node| left.push((node, depth + 1));
        match &node.expr {
            Expr::Call(call) => {
                let name = &*call.func_name;
                if !OPERATORS.contains(&name) && !FUNCTIONS.contains(&name) {
                    return Err(format!("calls {name}; it may call {}", FUNCTIONS.join(", ")));
                }
                sums += usize::from(name == operators::ADD);
                call.target.as_deref().into_iter().chain(&call.args).for_each(&mut within);
            }
            Expr::Select(select) => {
                if let Expr::Ident(name) = &select.operand.expr {
                    check_field(name, &select.field)?;
                }
                within(&*select.operand);
            }
            Expr::Ident(name) => {
                if !NAMES.iter().any(|(known, _)| known == name) {
                    let known: Vec<_> = NAMES.iter().map(|(known, _)| *known).collect();
                    return Err(format!("names {name}; there is {}", known.join(", ")));
                }
            }
            Expr::List(list) => list.elements.iter().for_each(&mut within),
            Expr::Map(map) => {
                for entry in &map.entries {
                    match &entry.expr {
                        EntryExpr::MapEntry(entry) => {
                            [&entry.key, &entry.value].into_iter().for_each(&mut within)
                        }
                        EntryExpr::StructField(field) => within(&field.value),
                    }
                }
            }
            Expr::Literal(_) => {}
            Expr::Comprehension(_) => {
                return Err("loops (all, exists, exists_one, filter, map), which it may not: \
                    `in` and conditions on headers and claims look at each element"
                    .to_owned());
            }
            Expr::Struct(_) | Expr::Unspecified => return Err("makes a message, which it may not".to_owned()),
        }
    }
    if sums > MOST_SUMS {
        return Err(format!("has more than {MOST_SUMS} sums"));
    }
    Ok(())
}

fn check_field(name: &str, field: &str) -> Result<(), String> {
    let fields = NAMES.iter().find(|(known, _)| *known == name).map_or(&[][..], |(_, fields)| fields);
    if fields.is_empty() || fields.contains(&field) {
        return Ok(());
    }
    Err(format!("names {name}.{field}; there is {}", fields.join(", ")))
}

/// What names stand for. CEL asks for `request.path` before it asks for `request`, so that nothing is made that is not looked at.
struct Names<'f>(Facts<'f>);

impl VariableResolver for Names<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        if let Some((whole, field)) = name.split_once('.')
            && whole != "claims"
        {
            return self.field(whole, field);
        }
        let whole = match name.split_once('.') {
            Some((_, path)) => self.claim(path)?,
            None if name == "claims" => {
                let claims = self.0.request?.claims?;
                map(claims.iter().map(|(name, value)| (name.clone(), value_of(value))))
            }
            None => {
                let (_, fields) = NAMES.iter().find(|(known, _)| *known == name)?;
                let entries = fields.iter().filter_map(|field| {
                    let value = self.field(name, field)?;
                    Some(((*field).to_owned(), Value::try_from(value.as_ref()).ok()?))
                });
                map(entries)
            }
        };
        whole.try_into().ok().map(CowVal::Owned)
    }
}

impl<'f> Names<'f> {
    fn field(&self, name: &str, field: &str) -> Option<CowVal<'_, '_>> {
        let Facts { connection, request, .. } = &self.0;
        let text = match (name, field) {
            ("destination", "port") => return Some(CowVal::owned(CelInt::from(i64::from(connection.port)))),
            ("source", "address") => {
                return Some(CowVal::owned(CelString::from(connection.address.to_canonical().to_string())));
            }
            ("request", "host") => {
                let host = request.as_ref()?.host?;
                return Some(CowVal::owned(CelString::from(host_and_port(host).0.to_ascii_lowercase())));
            }
            ("request", "headers") => {
                let headers = headers(request.as_ref()?.headers);
                return headers.try_into().ok().map(CowVal::Owned);
            }
            ("request", "method") => request.as_ref()?.method.as_str(),
            ("request", "path") => request.as_ref()?.path,
            ("source", "identity") => connection.identity?.as_str(),
            ("source", "namespace") => connection.identity?.namespace(),
            ("source", "serviceAccount") => connection.identity?.service_account(),
            ("source", "trustDomain") => connection.identity?.trust_domain(),
            _ => return None,
        };
        Some(CowVal::owned(CelString::from(text)))
    }

    fn claim(&self, path: &str) -> Option<Value> {
        let mut names = path.split('.');
        let first = self.0.request?.claims?.get(names.next()?)?;
        names.try_fold(first, |value, name| value.as_object()?.get(name)).map(value_of)
    }
}

/// By names in lower case. Several of one name are one, with commas between their values.
fn headers(headers: &HeaderMap) -> Value {
    map(headers.keys().map(|name| {
        let lines = headers.get_all(name).iter().map(|line| String::from_utf8_lossy(line.as_bytes()));
        (name.as_str().to_owned(), Value::from(lines.collect::<Vec<_>>().join(",")))
    }))
}

fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::Null,
        Json::Bool(is) => Value::Bool(*is),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(number), _) => Value::Int(number),
            (None, Some(number)) => Value::Float(number),
            (None, None) => Value::Null,
        },
        Json::String(text) => Value::from(text.clone()),
        Json::Array(elements) => Value::List(Arc::new(elements.iter().map(value_of).collect())),
        Json::Object(entries) => map(entries.iter().map(|(name, value)| (name.clone(), value_of(value)))),
    }
}

fn map(entries: impl Iterator<Item = (String, Value)>) -> Value {
    let entries = entries.map(|(name, value)| (Key::String(Arc::new(name)), value));
    Value::Map(Map { map: Arc::new(entries.collect::<HashMap<_, _>>()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_and_why() {
        let check = |text: &str, expected: &str| {
            let error = Expression::parse(text).map(|_| ()).unwrap_err();
            assert_eq!(error, expected, "{text}");
        };
        check("reqest.path == '/'", "names reqest; there is request, source, destination, claims");
        check("request.pth == '/'", "names request.pth; there is method, path, host, headers");
        check("destination.address == ''", "names destination.address; there is port");
        let may_call = "it may call contains, endsWith, int, size, startsWith, string";
        check("request.path.matches('a*')", &format!("calls matches; {may_call}"));
        check("duration('1s') == duration('2s')", &format!("calls duration; {may_call}"));
        check("1 * 2 == 2", &format!("calls _*_; {may_call}"));
        let loops = "loops (all, exists, exists_one, filter, map), which it may not: \
            `in` and conditions on headers and claims look at each element";
        for name in ["all", "exists", "exists_one", "filter", "map"] {
            check(&format!("claims.groups.{name}(it, it == 'a')"), loops);
        }
        check("[1, 2].exists(it, it == destination.port)", loops);
        check("claims.groups.all(a, claims.groups.all(b, a == b))", loops);
        check("Message{} == Message{}", "makes a message, which it may not");
        check(&"a".repeat(4097), "is longer than 4096 bytes");
        let sums = ["request.path"; 10].join(" + ");
        check(&format!("{sums} == ''"), "has more than 8 sums");
    }

    #[test]
    fn what_is_no_cel_says_where() {
        for text in
            ["", " ", "request.path ==", "a b", "'", "request.?path", "(", "\0", "request..path", "é == 1"]
        {
            let error = Expression::parse(text).unwrap_err();
            assert!(error.starts_with("is no CEL"), "{text:?} {error}");
        }
    }

    /// On a stack that is smaller than any that they are read and evaluated on.
    #[test]
    fn nothing_is_nested_so_deeply_that_the_stack_ends() {
        let nested = |count: usize| {
            [
                format!("{}true{}", "(".repeat(count), ")".repeat(count)),
                format!("{}true{}", "[".repeat(count), "]".repeat(count)),
                format!("{}true{}", "{1: ".repeat(count), "}".repeat(count)),
                format!("{}true{}", "size(".repeat(count), ")".repeat(count)),
                format!("{}true", "!".repeat(count)),
                format!("{}1 == 1", "-".repeat(count)),
                format!("{}true{}", "!(".repeat(count), ")".repeat(count)),
                format!("{}true", "true ? true : ".repeat(count)),
                format!("claims{}", ".a".repeat(count)),
                format!("claims{}", "[0]".repeat(count)),
                format!("claims{}", ".size()".repeat(count)),
                format!("1{} == 1", " + 1".repeat(count)),
                format!("true{}", " && true".repeat(count)),
                format!("true{}", " || claims.a".repeat(count)),
                format!("true{}", " == true".repeat(count)),
                format!("true{}", " in []".repeat(count)),
                format!("1 in [{}1]", "1, ".repeat(count)),
            ]
        };
        let read_all = move || {
            for count in [1, 8, 15, 40, 120, 250, 500, 1_000] {
                for text in nested(count) {
                    let Ok(expression) = Expression::parse(&text) else { continue };
                    let method = http::Method::GET;
                    let claims = serde_json::Map::new();
                    let request = super::super::Request {
                        method: &method,
                        path: "/",
                        ignores_path_case: false,
                        host: None,
                        headers: &HeaderMap::new(),
                        claims: Some(&claims),
                        is_grpc: false,
                    };
                    let connection =
                        super::super::Connection { identity: None, address: [10, 0, 0, 1].into(), port: 80 };
                    _ = expression.evaluate(&Facts { connection, request: Some(request), in_doubt: true });
                }
            }
        };
        std::thread::Builder::new().stack_size(1 << 20).spawn(read_all).unwrap().join().unwrap();
    }

    #[test]
    fn what_people_write_is_not_nested_too_deeply() {
        let hosts: Vec<_> = (0..60).map(|n| format!("request.path.startsWith(\"/api/v1/t{n}\")")).collect();
        assert!(Expression::parse(&hosts[..40].join(" || ")).is_ok());
        assert!(
            Expression::parse("(((request.path == '/')) && ((source.namespace == 'a') || (true)))").is_ok()
        );
    }
}

/** The one error type of the package, with a stable `code`. */

/** Stable kinds of failure. Compare with `error.code`; messages may change. */
export type CacheErrorCode =
  /** An argument has the wrong type, range or length; `details` names the field. */
  | 'InvalidArgument'
  /** The call is right but not possible now, as in sampling before any token was prefilled. */
  | 'InvalidState'
  /** Well formed, but this model, build or machine cannot do it. */
  | 'Unsupported'
  /** NaN or infinity in the input. */
  | 'NonFinite'
  /** A file breaks its format. */
  | 'Malformed'
  /** Another call of the same session is in flight, or another process writes this session. */
  | 'Busy'
  /** Used after `close()`. */
  | 'Closed'
  /** The signal was aborted; nothing of the running pass remains. */
  | 'Cancelled'
  /** No session of this tenant has this id. */
  | 'NoSession'
  /** A stored session does not fit the model or the options it was resumed with. */
  | 'Mismatch'
  /** More tokens than the model was made for; the session is unchanged. */
  | 'ContextOverflow'
  | 'OutOfMemory'
  /** The disk or the store's limit is full; nothing was written. */
  | 'StoreFull'
  /** Reading or writing a file failed. */
  | 'Io'
  /** The native file cannot be loaded; the message says what was tried. */
  | 'NativeUnavailable'
  /** Defects of kvasir: please report them. After a `Panic` in a call of a session the session can only be closed. */
  | 'Panic'
  | 'Internal'
  // Codes of crates that are newer than this list stay readable.
  | (string & {})

/** Everything that kvasir throws or rejects with. */
export class CacheError extends Error {
  override readonly name = 'CacheError'
  /** Stable kind of failure. */
  readonly code: CacheErrorCode
  /** Numbers and names behind the message, as in `{ field, expected, got }`. */
  readonly details: Readonly<Record<string, unknown>>

  constructor(
    code: CacheErrorCode,
    message: string,
    details: Readonly<Record<string, unknown>> = {},
    cause?: unknown,
  ) {
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    this.details = details
  }
}

/** `field: expected …, got …`. @internal */
export function invalid(field: string, expected: string, got: unknown): CacheError {
  const shown = show(got)
  return new CacheError('InvalidArgument', `${field}: expected ${expected}, got ${shown}`, {
    field,
    expected,
    got: shown,
  })
}

function show(value: unknown): string {
  if (typeof value === 'string')
    return JSON.stringify(value.length > 60 ? `${value.slice(0, 60)}…` : value)
  if (ArrayBuffer.isView(value)) {
    return `${value.constructor.name}(${'length' in value ? value.length : value.byteLength})`
  }
  if (Array.isArray(value)) return `an array of ${value.length}`
  if (typeof value === 'object' && value !== null) return value.constructor?.name ?? 'an object'
  return String(value)
}

const PREFIX = 'kvasir-error:'

/** Turns what the native side threw into a `CacheError`. @internal */
export function fromNative(error: unknown): CacheError {
  if (error instanceof CacheError) return error
  const message = error instanceof Error ? error.message : String(error)
  const at = message.indexOf(PREFIX)
  if (at >= 0) {
    try {
      const body = JSON.parse(message.slice(at + PREFIX.length)) as {
        code: string
        message: string
        details?: Record<string, unknown>
      }
      return new CacheError(body.code, body.message, body.details ?? {})
    } catch {
      // Fall through: the text below is better than nothing.
    }
  }
  // Conversions that napi itself refuses arrive with its own codes.
  const code = (error as { code?: unknown } | null)?.code
  const kinds = [
    'InvalidArg',
    'StringExpected',
    'NumberExpected',
    'ObjectExpected',
    'BooleanExpected',
  ]
  const known = typeof code === 'string' && (kinds.includes(code) || code.endsWith('Expected'))
  return new CacheError(known ? 'InvalidArgument' : 'Internal', message, {}, error)
}

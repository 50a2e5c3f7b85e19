/** The URL of the running build; the CommonJS build has one of its own (see build.mjs). */
export const here = (): string => import.meta.url;
